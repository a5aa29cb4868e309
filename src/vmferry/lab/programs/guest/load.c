/* Rewrites random pages of an area at a given rate, and checks each page before it rewrites it.
 *
 * vmferry.load=MIB,MB_PER_S,MODE. A page carries its own number, its generation and a checksum of
 * its content; the generation it must have is kept apart. So a page that was lost, that came twice
 * or that came from elsewhere is found, whatever its content.
 */
#include "guest.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define TICK_NS 1000000000LL
#define SLICE_NS 10000000LL
/* After a pause the load does not catch up more than this: it would only burst. */
#define CATCH_UP_NS 50000000LL
#define PHRASES 512
#define PHRASE 16

enum mode { TEXT, INCOMPRESSIBLE, ZEROS };

struct page {
	uint64_t number;
	uint64_t generation;
	uint64_t sum;
	uint64_t mode;
	uint64_t content[(PAGE - 32) / 8];
};

static struct page *area;
static uint32_t *generations;
static char phrases[PHRASES][PHRASE];
static uint64_t randomness = 0x9E3779B97F4A7C15;
static unsigned long corrupt;

static uint64_t checksum(const struct page *page)
{
	uint64_t a = page->number + 1, b = page->generation + 1;

	for (size_t i = 0; i < sizeof page->content / 8; i += 4) {
		a += page->content[i] ^ (b << 1);
		b += page->content[i + 1] ^ (a >> 3);
		a += page->content[i + 2] + i;
		b += page->content[i + 3];
	}
	return a ^ (b * 0x9E3779B97F4A7C15);
}

/* Phrases of two or three words made of syllables; as compressible as source code: in batches of
 * 64 pages LZ4 makes a third of it, zstd a sixth. */
static void make_phrases(void)
{
	static const char *syllables[] = {"ra",	 "ti", "on ", "the ", "mo", "ve",  "s ",  "ing ",
					  "an",	 "d ", "pa",  "ge ",  "in", "co",  "er ", "me",
					  "mory ", "ho", "st ", "to ", "un", "li",  "ke ", "al ",
					  "re",	 "si", "de ", "vi",  "ce ", "qu", "ee", "ly "};
	uint64_t state = 12345;

	for (int i = 0; i < PHRASES; i++) {
		char text[2 * PHRASE] = "";
		size_t length = 0;

		while (length < PHRASE) {
			const char *s = syllables[(next_random(&state) >> 24) % 32];
			size_t n = strlen(s);

			memcpy(text + length, s, n);
			length += n;
		}
		memcpy(phrases[i], text, PHRASE);
	}
}

static void fill(struct page *page, enum mode mode)
{
	uint64_t state = randomness;
	size_t words = sizeof page->content / 8;

	switch (mode) {
	case TEXT:
		for (size_t i = 0; i + 1 < words; i += 8) {
			uint64_t r = next_random(&state);

			for (size_t j = 0; j < 8 && i + j + 1 < words; j += 2, r >>= 16)
				memcpy(&page->content[i + j], phrases[(r >> 3) % PHRASES], PHRASE);
		}
		break;
	case INCOMPRESSIBLE:
		for (size_t i = 0; i < words; i++)
			page->content[i] = next_random(&state);
		break;
	case ZEROS:
		/* One word in sixteen is not zero. */
		memset(page->content, 0, sizeof page->content);
		for (size_t i = 0; i < words; i += 16)
			page->content[i] = next_random(&state) & 0xFFFF;
		break;
	}
	randomness = state;
}

static void write_page(size_t number, enum mode mode)
{
	struct page *page = &area[number];

	page->number = number;
	page->generation = ++generations[number];
	page->mode = mode;
	fill(page, mode);
	page->sum = checksum(page);
}

static void check_page(size_t number)
{
	const struct page *page = &area[number];

	if (page->number == number && page->generation == generations[number] &&
	    page->sum == checksum(page))
		return;
	if (corrupt++ < 20)
		say("CORRUPT page %zu holds number %lu generation %lu, wanted generation %u", number,
		    (unsigned long)page->number, (unsigned long)page->generation,
		    generations[number]);
}

static enum mode mode_named(const char *name)
{
	if (!strcmp(name, "incompressible"))
		return INCOMPRESSIBLE;
	return strcmp(name, "zeros") ? TEXT : ZEROS;
}

void load_main(const char *parameters)
{
	unsigned long mib = 0, megabytes_per_s = 0;
	char name[32] = "text";

	sscanf(parameters, "%lu,%lu,%31s", &mib, &megabytes_per_s, name);
	enum mode mode = mode_named(name);
	size_t pages = (mib << 20) / PAGE;

	if (pages) {
		int flags = MAP_PRIVATE | MAP_ANONYMOUS;

		area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
		generations = mmap(NULL, pages * 4, PROT_READ | PROT_WRITE, flags, -1, 0);
		if (area == MAP_FAILED || generations == MAP_FAILED) {
			say("LOAD-FAILED no memory for %lu MiB", mib);
			return;
		}
		make_phrases();
		for (size_t i = 0; i < pages; i++)
			write_page(i, mode);
	}
	say("LOAD-READY %s", parameters);

	uint64_t choice = 0xD1B54A32D192ED03;
	unsigned long long written = 0, ticks = 0;
	double owed = 0, pages_per_ns = (double)megabytes_per_s * 1e6 / PAGE / 1e9;
	int64_t last = now_ns(), tick = last + TICK_NS;

	for (;;) {
		int64_t now = now_ns(), passed = now - last;

		last = now;
		owed += pages_per_ns * (double)(passed < CATCH_UP_NS ? passed : CATCH_UP_NS);
		for (; pages && owed >= 1; owed -= 1, written++) {
			size_t number = (next_random(&choice) >> 20) % pages;

			check_page(number);
			write_page(number, mode);
		}
		if (now >= tick) {
			say("TICK %llu written %llu corrupt %lu", ++ticks, written, corrupt);
			tick += TICK_NS;
			if (tick < now)
				tick = now + TICK_NS;
		}
		sleep_until_ns(pages && megabytes_per_s ? now + SLICE_NS : tick);
	}
}
