/* Writes blocks of a disk with O_DIRECT, reads them again and checks them (vmferry.disk=DEVICE). */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 65536
#define BLOCKS 256
#define PAUSE_NS 20000000LL
#define TICK_NS 1000000000LL

static void stamp(uint64_t *block, uint64_t number, uint64_t generation)
{
	uint64_t state = (number << 32) + generation + 1;

	for (size_t i = 0; i < BLOCK / 8; i += 64)
		block[i] = next_random(&state);
	block[0] = number;
	block[1] = generation;
}

void disk_main(const char *device)
{
	static uint32_t generations[BLOCKS];
	uint64_t *written, *seen, choice = 0xA0761D6478BD642F;
	unsigned long operations = 0, bad = 0;
	int file = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);

	if (file < 0 || posix_memalign((void **)&written, 4096, BLOCK) ||
	    posix_memalign((void **)&seen, 4096, BLOCK)) {
		say("DISK-FAILED %s: %s", device, strerror(errno));
		return;
	}
	memset(written, 0, BLOCK);
	for (int64_t tick = now_ns() + TICK_NS;;) {
		unsigned int to = (next_random(&choice) >> 20) % BLOCKS;
		unsigned int from = (next_random(&choice) >> 20) % BLOCKS;

		stamp(written, to, ++generations[to]);
		if (pwrite(file, written, BLOCK, (off_t)to * BLOCK) != BLOCK) {
			bad++;
			say("DISKBAD write of block %u: %s", to, strerror(errno));
		}
		if (generations[from]) {
			stamp(written, from, generations[from]);
			memset(seen, 0xFF, BLOCK);
			if (pread(file, seen, BLOCK, (off_t)from * BLOCK) != BLOCK ||
			    memcmp(seen, written, BLOCK)) {
				bad++;
				say("DISKBAD block %u generation %u", from, generations[from]);
			}
		}
		operations++;
		if (now_ns() >= tick) {
			say("DISK operations %lu bad %lu", operations, bad);
			tick = now_ns() + TICK_NS;
		}
		sleep_until_ns(now_ns() + PAUSE_NS);
	}
}
