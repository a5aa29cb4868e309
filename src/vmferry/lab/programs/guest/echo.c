/* Answers the outside client: UDP echo (port 7) and a TCP counter (port 7001).
 *
 * A TCP request is a number of 8 bytes; the answer is that number plus one and how many requests
 * this connection has had, so that a request or an answer that is lost or doubled is seen.
 */
#include "guest.h"

#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECTIONS 32

struct connection {
	uint64_t requests;
	size_t held;
	unsigned char request[8];
};

static int listener(int kind, uint16_t port)
{
	struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	/* What waited for a guest that moved comes all at once: it must not be dropped here. */
	int on = 1, off = 0, buffer = 8 << 20;
	int sock = socket(AF_INET6, kind | SOCK_CLOEXEC, 0);

	setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (kind == SOCK_DGRAM)
		setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
	setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	if (sock < 0 || bind(sock, (struct sockaddr *)&address, sizeof address) ||
	    (kind == SOCK_STREAM && listen(sock, CONNECTIONS)))
		say("ECHO port %u: %s", port, strerror(errno));
	return sock;
}

static void answer_datagrams(int sock)
{
	for (;;) {
		unsigned char data[2048];
		struct sockaddr_in6 from;
		socklen_t length = sizeof from;
		ssize_t size = recvfrom(sock, data, sizeof data, MSG_DONTWAIT,
					(struct sockaddr *)&from, &length);

		if (size < 0)
			return;
		sendto(sock, data, size, MSG_DONTWAIT, (struct sockaddr *)&from, length);
	}
}

/* Nonzero when the connection is over. */
static int answer_stream(int sock, struct connection *c)
{
	unsigned char data[1024];
	ssize_t size = recv(sock, data, sizeof data, MSG_DONTWAIT);

	if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR))
		return 1;
	for (ssize_t i = 0; i < size; i++) {
		c->request[c->held++] = data[i];
		if (c->held < sizeof c->request)
			continue;
		uint64_t number, answer[2];

		c->held = 0;
		memcpy(&number, c->request, sizeof number);
		answer[0] = htobe64(be64toh(number) + 1);
		answer[1] = htobe64(++c->requests);
		if (send(sock, answer, sizeof answer, MSG_NOSIGNAL) != sizeof answer)
			return 1;
	}
	return 0;
}

void echo_main(void)
{
	static struct connection connections[CONNECTIONS];
	struct pollfd polled[2 + CONNECTIONS];
	int count = 2, on = 1;

	polled[0] = (struct pollfd){listener(SOCK_DGRAM, 7), POLLIN, 0};
	polled[1] = (struct pollfd){listener(SOCK_STREAM, 7001), POLLIN, 0};
	while (poll(polled, count, -1) >= 0 || errno == EINTR) {
		if (polled[0].revents)
			answer_datagrams(polled[0].fd);
		for (int i = 2; i < count; i++) {
			if (!polled[i].revents || !answer_stream(polled[i].fd, &connections[i - 2]))
				continue;
			close(polled[i].fd);
			count--;
			polled[i] = polled[count];
			connections[i - 2] = connections[count - 2];
			i--;
		}
		if (polled[1].revents && count < 2 + CONNECTIONS) {
			int sock = accept4(polled[1].fd, NULL, NULL, SOCK_CLOEXEC);

			if (sock < 0)
				continue;
			setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
			connections[count - 2] = (struct connection){0};
			polled[count++] = (struct pollfd){sock, POLLIN, 0};
		}
	}
	say("ECHO poll: %s", strerror(errno));
}
