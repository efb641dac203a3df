/*
 * Limit of a change of many leaves: the entries of 1 GiB in 4 KiB pages, each loaded and stored by one
 * 8-byte access, as whoever changes a table that others walk must.  COUNT is taken for 13 pages each.
 */
#include "rival.h"

enum { TURNS = 9 };

#define LEAF 0x0e00000000000377ULL /* present, writable in the host and here, A, D, write-back, R, W, X */

static void fill(uint64_t *entries, long pages)
{
	for (long i = 0; i < pages; i++)
		entries[i] = LEAF | (uint64_t)i << 12;
}

static void change(uint64_t *entries, long pages, uint64_t clear)
{
	for (long i = 0; i < pages; i++) {
		uint64_t entry = __atomic_load_n(&entries[i], __ATOMIC_ACQUIRE);

		if (entry & 1ULL << 59)
			__atomic_store_n(&entries[i], entry & ~clear, __ATOMIC_RELEASE);
	}
}

static int64_t timed(uint64_t *entries, long pages, uint64_t clear)
{
	int64_t took[TURNS];

	for (int turn = 0; turn < TURNS; turn++) {
		fill(entries, pages);
		int64_t start = now_ns();

		change(entries, pages, clear);
		took[turn] = now_ns() - start;
	}
	qsort(took, TURNS, sizeof(*took), by_time);
	return took[TURNS / 2];
}

int main(int argc, char **argv)
{
	long pages = pages_of(count_argument(argc, argv));
	uint64_t *entries = aligned_alloc(4096, (size_t)pages * sizeof(*entries));

	require_one_core();
	if (!entries)
		die("aligned_alloc");
	int64_t zap = timed(entries, pages, ~0ULL);
	int64_t protect = timed(entries, pages, 1ULL << 1);
	int64_t age = timed(entries, pages, 1ULL << 8);

	printf("{\"p50\": %" PRId64 ", \"p99\": %" PRId64 ", \"parts\": {\"zap\": %" PRId64
	       ", \"write-protect\": %" PRId64 ", \"age\": %" PRId64 "}}\n",
	       zap, zap, zap, protect, age);
	return 0;
}
