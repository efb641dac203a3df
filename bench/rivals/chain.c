/*
 * Limit of the fault chain's messages: A -> B -> C -> B -> A, as a page request goes from the device
 * to IOMMUFD to KVM and its response comes back.  Three processes, two Unix streams, one core.
 */
#include "rival.h"

static void answer(int fd)
{
	char message[MESSAGE_BYTES];

	while (get(fd, message))
		put(fd, message);
}

static void forward(int up, int down)
{
	char message[MESSAGE_BYTES];

	while (get(up, message)) {
		put(down, message);
		if (!get(down, message))
			die("C has gone");
		put(up, message);
	}
}

/* B, which makes C its child so that C sees its stream close when B goes. */
static void run_middle(int up)
{
	int ends[2];

	stream_pair(ends);
	if (fork_or_die() == 0) {
		close(up);
		close(ends[0]);
		answer(ends[1]);
		exit(0);
	}
	close(ends[1]);
	forward(up, ends[0]);
	close(ends[0]);
	wait(NULL);
}

int main(int argc, char **argv)
{
	long count = count_argument(argc, argv);
	int ends[2];

	require_one_core();
	stream_pair(ends);
	if (fork_or_die() == 0) {
		close(ends[0]);
		run_middle(ends[1]);
		return 0;
	}
	close(ends[1]);
	ask_and_report(ends[0], count);
	close(ends[0]);
	wait(NULL);
	return 0;
}
