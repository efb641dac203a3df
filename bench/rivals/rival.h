/*
 * What both C rivals share: a 64-byte message over a blocking AF_UNIX stream, one clock, one report.
 *
 * A rival is the limit a figure is held against, so it does what ours must do and nothing else: one
 * write and one read per hop.  All its processes share one core, set by the harness before it starts
 * us; on two cores the wake-up of an idle core would cost several times the path we want to see.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE_BYTES = 64 };

static inline void die(const char *what)
{
	perror(what);
	exit(2);
}

static inline void require_one_core(void)
{
	cpu_set_t allowed;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		die("sched_getaffinity");
	if (CPU_COUNT(&allowed) != 1) {
		fprintf(stderr, "not pinned: %d cores allowed, wanted 1\n", CPU_COUNT(&allowed));
		exit(2);
	}
}

static inline void stream_pair(int ends[2])
{
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair");
}

static inline pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

static inline void put(int fd, const char *message)
{
	if (write(fd, message, MESSAGE_BYTES) != MESSAGE_BYTES)
		die("write");
}

/* 0 once the other end has closed.  A stream may cut a message short, hence the loop. */
static inline int get(int fd, char *message)
{
	size_t have = 0;

	while (have < MESSAGE_BYTES) {
		ssize_t got = read(fd, message + have, MESSAGE_BYTES - have);

		if (got < 0)
			die("read");
		if (got == 0)
			return 0;
		have += (size_t)got;
	}
	return 1;
}

static inline int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int by_time(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

/* Asks `count` times over `fd` and prints the percentiles; a tenth more goes first, untimed. */
static inline void ask_and_report(int fd, long count)
{
	char message[MESSAGE_BYTES];
	int64_t *took = calloc((size_t)count, sizeof(*took));

	if (!took)
		die("calloc");
	memset(message, 'm', sizeof(message));
	for (long i = -(count / 10); i < count; i++) {
		int64_t start = now_ns();

		put(fd, message);
		if (!get(fd, message))
			die("the other end has gone");
		if (i >= 0)
			took[i] = now_ns() - start;
	}
	qsort(took, (size_t)count, sizeof(*took), by_time);
	printf("{\"p50\": %" PRId64 ", \"p99\": %" PRId64 "}\n", took[count / 2], took[count * 99 / 100]);
	free(took);
}

static inline long count_argument(int argc, char **argv)
{
	long count = argc == 2 ? atol(argv[1]) : 0;

	if (count < 1) {
		fprintf(stderr, "usage: %s COUNT\n", argv[0]);
		exit(2);
	}
	return count;
}

/* Of memory that is changed as a whole: 20,000 is 1 GiB, and a table of level 1 is not cut. */
static inline long pages_of(long count)
{
	long pages = count * 262144 / 20000 / 512 * 512;

	return pages < 512 ? 512 : pages;
}
