/* The outside client: what a user of the guest notices.
 *
 *     outside ADDRESS
 *
 * Sends one UDP echo request a millisecond and notes when each was answered, and keeps one TCP
 * connection going all the time, on which every request is answered by its number plus one and by
 * how many the connection has had. It is C, has real-time priority where it may, and takes arrival
 * times from the kernel, so that a busy machine does not look like a silent guest.
 *
 * Prints `ready` when the first echo and the first TCP reply are there.
 * Commands on standard input, one JSON line each on standard output; times are CLOCK_MONOTONIC ns:
 *     window T0 T1    what was seen between the two
 *     quit            (or the end of input)
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define UDP_PORT 7
#define TCP_PORT 7001
#define INTERVAL_NS 1000000LL
#define ECHOES_MAX (1 << 22) /* over an hour; pages are only taken when used */
#define REPLIES_MAX (1 << 22)
#define CONNECT_LIMIT_MS 5000
#define REPLY_LIMIT_MS 60000

struct echo {
	_Atomic int64_t sent;
	_Atomic int64_t answered; /* 0: not yet */
};

static struct echo *echoes;
static _Atomic size_t echoes_sent;
static _Atomic int64_t *arrivals; /* UDP answers in the order of their arrival, doubles too */
static _Atomic size_t arrival_count;
static _Atomic unsigned long echoes_doubled;

static _Atomic int64_t *replies; /* TCP */
static _Atomic size_t reply_count;
static _Atomic unsigned long replies_wrong, replies_doubled, connections, connection_losses;

static struct sockaddr_in udp_server, tcp_server;
static int udp;

/* Called once for UDP and once for TCP. */
static void note_first_answer(void)
{
	static atomic_int answered;

	if (++answered == 2) {
		puts("ready");
		fflush(stdout);
	}
}

static int64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until(int64_t when)
{
	struct timespec t = {when / 1000000000, when % 1000000000};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void *send_echoes(void *unused)
{
	int64_t next = clock_ns(CLOCK_MONOTONIC);

	for (size_t n = 0; n < ECHOES_MAX; n++) {
		uint64_t number = htobe64(n);

		next += INTERVAL_NS;
		sleep_until(next);
		int64_t now = clock_ns(CLOCK_MONOTONIC);
		if (now - next > INTERVAL_NS)
			next = now; /* late: skip, do not send a burst */
		echoes[n].sent = now;
		echoes_sent = n + 1;
		sendto(udp, &number, sizeof number, MSG_DONTWAIT, (struct sockaddr *)&udp_server,
		       sizeof udp_server);
	}
	return unused;
}

/* When the kernel took the datagram in, on CLOCK_MONOTONIC. */
static int64_t arrival_time(struct msghdr *message)
{
	int64_t now = clock_ns(CLOCK_MONOTONIC), real = clock_ns(CLOCK_REALTIME);

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		struct timespec t;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_TIMESTAMPNS)
			continue;
		memcpy(&t, CMSG_DATA(c), sizeof t);
		return now - (real - ((int64_t)t.tv_sec * 1000000000 + t.tv_nsec));
	}
	return now;
}

static void *receive_echoes(void *unused)
{
	for (;;) {
		uint64_t number;
		char control[128];
		struct iovec data = {&number, sizeof number};
		struct msghdr message = {.msg_iov = &data,
					 .msg_iovlen = 1,
					 .msg_control = control,
					 .msg_controllen = sizeof control};
		ssize_t size = recvmsg(udp, &message, 0);

		if (size != sizeof number)
			continue; /* ICMP errors come here too */
		number = be64toh(number);
		if (number >= echoes_sent)
			continue;
		int64_t when = arrival_time(&message);
		if (echoes[number].answered)
			echoes_doubled++;
		else
			echoes[number].answered = when;
		size_t at = arrival_count;
		if (at < ECHOES_MAX) {
			arrivals[at] = when;
			arrival_count = at + 1;
		}
		if (at == 0)
			note_first_answer();
	}
	return unused;
}

/* Nonzero when `length` bytes came. */
static int receive_all(int sock, void *into, size_t length, int limit_ms)
{
	for (size_t have = 0; have < length;) {
		struct pollfd polled = {sock, POLLIN, 0};

		if (poll(&polled, 1, limit_ms) <= 0)
			return 0;
		ssize_t size = recv(sock, (char *)into + have, length - have, 0);
		if (size <= 0)
			return 0;
		have += size;
	}
	return 1;
}

static int connect_once(void)
{
	int on = 1, sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int error = 0;
	socklen_t length = sizeof error;
	struct pollfd polled = {sock, POLLOUT, 0};

	if (connect(sock, (struct sockaddr *)&tcp_server, sizeof tcp_server) && errno == EINPROGRESS) {
		poll(&polled, 1, CONNECT_LIMIT_MS);
		getsockopt(sock, SOL_SOCKET, SO_ERROR, &error, &length);
	}
	if (error || (polled.revents & POLLOUT) == 0) {
		close(sock);
		return -1;
	}
	setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	return sock;
}

static void use_connection(int sock)
{
	for (uint64_t requests = 1;; requests++) {
		/* A number that no other connection has had. */
		uint64_t number = ((uint64_t)connections << 40) + requests;
		uint64_t request = htobe64(number), reply[2];
		char more;

		if (recv(sock, &more, 1, MSG_DONTWAIT) > 0)
			replies_doubled++;
		if (send(sock, &request, sizeof request, MSG_NOSIGNAL) != sizeof request ||
		    !receive_all(sock, reply, sizeof reply, REPLY_LIMIT_MS))
			return;
		if (be64toh(reply[0]) != number + 1 || be64toh(reply[1]) != requests)
			replies_wrong++;
		size_t at = reply_count;
		if (at < REPLIES_MAX) {
			replies[at] = clock_ns(CLOCK_MONOTONIC);
			reply_count = at + 1;
		}
		if (at == 0)
			note_first_answer();
		sleep_until(clock_ns(CLOCK_MONOTONIC) + INTERVAL_NS);
	}
}

static void *keep_connection(void *unused)
{
	for (;;) {
		int sock = connect_once();

		if (sock < 0) {
			sleep_until(clock_ns(CLOCK_MONOTONIC) + 100 * INTERVAL_NS);
			continue;
		}
		connections++;
		use_connection(sock);
		connection_losses++;
		close(sock);
	}
	return unused;
}

/* The longest time in [from, to] without one of these (ascending) times. */
static double longest_gap_ms(_Atomic int64_t *times, size_t count, int64_t from, int64_t to)
{
	int64_t last = from, longest = 0;

	for (size_t i = 0; i < count; i++) {
		int64_t t = times[i];

		if (t <= last)
			continue;
		if (t > to)
			break;
		if (t - last > longest)
			longest = t - last;
		last = t;
	}
	if (to - last > longest)
		longest = to - last;
	return longest / 1e6;
}

static int ascending(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

static void print_window(int64_t from, int64_t to)
{
	size_t sent = 0, lost = 0, total = echoes_sent, replies_seen = 0;
	int64_t last_sent = 0, first_lost = 0, last_lost = 0;
	double send_gap = 0, slowest = 0, *trips = malloc((total + 1) * sizeof *trips);
	size_t trip_count = 0;

	for (size_t i = 0; i < total; i++) {
		int64_t at = echoes[i].sent, answered = echoes[i].answered;

		if (at < from || at > to)
			continue;
		if (last_sent && (at - last_sent) / 1e6 > send_gap)
			send_gap = (at - last_sent) / 1e6;
		last_sent = at;
		sent++;
		if (!answered) {
			lost++;
			if (!first_lost)
				first_lost = at;
			last_lost = at;
			continue;
		}
		trips[trip_count++] = (answered - at) / 1e6;
		if (trips[trip_count - 1] > slowest)
			slowest = trips[trip_count - 1];
	}
	/* Times are positive doubles: their order is that of their bits. */
	qsort(trips, trip_count, sizeof *trips, ascending);
	for (size_t i = 0; i < reply_count; i++)
		replies_seen += replies[i] >= from && replies[i] <= to;
	printf("{\"blackout_ms\":%.3f,\"echoes_sent\":%zu,\"echoes_lost\":%zu,"
	       "\"lost_after_ms\":%.3f,\"lost_span_ms\":%.3f,\"echoes_doubled\":%lu,\"round_trip_ms_median\":%.3f,"
	       "\"round_trip_ms_max\":%.3f,\"send_gap_ms\":%.3f,\"tcp_replies\":%zu,"
	       "\"tcp_gap_ms\":%.3f,\"tcp_wrong\":%lu,\"tcp_doubled\":%lu,"
	       "\"tcp_connections\":%lu,\"tcp_losses\":%lu}\n",
	       longest_gap_ms(arrivals, arrival_count, from, to), sent, lost,
	       first_lost ? (first_lost - from) / 1e6 : 0.0, (last_lost - first_lost) / 1e6,
	       (unsigned long)echoes_doubled,
	       trip_count ? trips[trip_count / 2] : 0.0, slowest, send_gap, replies_seen,
	       longest_gap_ms(replies, reply_count, from, to), (unsigned long)replies_wrong,
	       (unsigned long)replies_doubled, (unsigned long)connections,
	       (unsigned long)connection_losses);
	fflush(stdout);
	free(trips);
}

static void *room_for(size_t count, size_t size)
{
	void *at = mmap(NULL, count * size, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return at;
}

int main(int argc, char **argv)
{
	struct sched_param priority = {.sched_priority = 10};
	void *(*jobs[])(void *) = {send_echoes, receive_echoes, keep_connection};
	int on = 1, buffer = 4 << 20;
	char line[256];
	long long from, to;

	udp_server.sin_family = AF_INET;
	udp_server.sin_port = htons(UDP_PORT);
	if (argc != 2 || !inet_aton(argv[1], &udp_server.sin_addr)) {
		fprintf(stderr, "usage: outside ADDRESS\n");
		return 2;
	}
	echoes = room_for(ECHOES_MAX, sizeof *echoes);
	arrivals = room_for(ECHOES_MAX, sizeof *arrivals);
	replies = room_for(REPLIES_MAX, sizeof *replies);
	tcp_server = udp_server;
	tcp_server.sin_port = htons(TCP_PORT);
	udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	setsockopt(udp, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
	setsockopt(udp, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
	if (sched_setscheduler(0, SCHED_FIFO, &priority))
		setpriority(PRIO_PROCESS, 0, -20);
	for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, jobs[i], NULL)) {
			perror("pthread_create");
			return 1;
		}
	}
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "window %lld %lld", &from, &to) == 2)
			print_window(from, to);
		else if (!strncmp(line, "quit", 4))
			break;
	}
	return 0;
}
