/*
 * Limit of one request and one reply: A -> B -> A over a Unix stream, two processes, one core.
 */
#include "rival.h"

static void answer(int fd)
{
	char message[MESSAGE_BYTES];

	while (get(fd, message))
		put(fd, message);
}

int main(int argc, char **argv)
{
	long count = count_argument(argc, argv);
	int ends[2];

	require_one_core();
	stream_pair(ends);
	if (fork_or_die() == 0) {
		close(ends[0]);
		answer(ends[1]);
		return 0;
	}
	close(ends[1]);
	ask_and_report(ends[0], count);
	/* Closing is how B learns that it may go; waiting charges its CPU time to us. */
	close(ends[0]);
	wait(NULL);
	return 0;
}
