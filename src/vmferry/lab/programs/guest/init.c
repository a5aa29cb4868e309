/* PID 1: kernel modules, network, then a process for each job that the command line asks for. */
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int console = -1;

void say(const char *format, ...)
{
	char line[256];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length > (int)sizeof line - 2)
		length = sizeof line - 2;
	line[length++] = '\n';
	if (write(console, line, length) < 0)
		return;
}

const char *parameter(const char *key)
{
	static char text[4096];
	static char value[256];

	if (!text[0]) {
		int file = open("/proc/cmdline", O_RDONLY);
		ssize_t length = read(file, text, sizeof text - 1);
		close(file);
		if (length <= 0)
			return NULL;
	}
	size_t key_length = strlen(key);
	for (const char *word = text; *word; word += strspn(word, " \n")) {
		size_t length = strcspn(word, " \n");
		if (length > key_length && !memcmp(word, key, key_length) && word[key_length] == '=') {
			snprintf(value, sizeof value, "%.*s", (int)(length - key_length - 1),
				 word + key_length + 1);
			return strdup(value);
		}
		word += length;
	}
	return NULL;
}

/* The builder has numbered the files so that what a module needs comes before it. */
static void insert_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, NULL, alphasort);

	for (int i = 0; i < count; i++) {
		char path[300];

		if (names[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
		int file = open(path, O_RDONLY | O_CLOEXEC);
		if (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST)
			say("MODULE %s: %s", names[i]->d_name, strerror(errno));
		close(file);
	}
}

static int set_flags_up(int sock, const char *name)
{
	struct ifreq request = {0};

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(sock, SIOCGIFFLAGS, &request))
		return -1;
	request.ifr_flags |= IFF_UP;
	return ioctl(sock, SIOCSIFFLAGS, &request);
}

static int set_address(int sock, unsigned long what, const char *name, in_addr_t address)
{
	struct ifreq request = {0};
	struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	in->sin_family = AF_INET;
	in->sin_addr.s_addr = address;
	return ioctl(sock, what, &request);
}

static void configure_network(const char *address)
{
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char text[32];
	int prefix = 24;

	set_flags_up(sock, "lo");
	if (!address)
		return;
	if (sscanf(address, "%31[0-9.]/%d", text, &prefix) < 1 ||
	    set_address(sock, SIOCSIFADDR, "eth0", inet_addr(text)) ||
	    set_address(sock, SIOCSIFNETMASK, "eth0", htonl(~0u << (32 - prefix))) ||
	    set_flags_up(sock, "eth0"))
		say("NETWORK eth0 %s: %s", address, strerror(errno));
	close(sock);
}

static void start_job(void (*job)(const char *), const char *argument)
{
	pid_t pid = fork();

	if (pid < 0)
		say("FORK %s", strerror(errno));
	if (pid == 0) {
		job(argument);
		_exit(0);
	}
}

static void echo_job(const char *unused)
{
	(void)unused;
	echo_main();
}

int main(void)
{
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	console = open("/dev/ttyS0", O_WRONLY | O_NOCTTY | O_CLOEXEC);
	insert_modules();
	configure_network(parameter("vmferry.address"));
	start_job(echo_job, NULL);
	const char *disk = parameter("vmferry.disk");
	if (disk)
		start_job(disk_main, disk);
	const char *load = parameter("vmferry.load");
	start_job(load_main, load ? load : "0,0,text");
	for (;;) {
		int status;
		pid_t pid = wait(&status);

		if (pid < 0)
			pause();
		else
			say("DIED %d status %x", pid, status);
	}
}
