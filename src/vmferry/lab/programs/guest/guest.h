/* The lab's guest: one static program that is init, load, echo server and disk load. */
#ifndef VMFERRY_GUEST_H
#define VMFERRY_GUEST_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* One line to the serial console by one write, so that lines of several processes never mix. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The value of key= on the kernel's command line, or NULL. */
const char *parameter(const char *key);

void echo_main(void);
void load_main(const char *parameters);
void disk_main(const char *device);

static inline uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state; /* xorshift64 */
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static inline int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void sleep_until_ns(int64_t when)
{
	struct timespec t = {when / 1000000000, when % 1000000000};
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

#endif
