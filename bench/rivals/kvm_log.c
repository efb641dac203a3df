/*
 * What a real KVM takes for the dirty log of a slot, and to lose one: memory of 4 KiB pages, a guest that
 * stores to each.  The guest is six instructions in flat 32-bit mode.  COUNT is taken for 13 pages each.
 */
#include "rival.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { PAGE = 4096, CODE_AT = 0x1000, CLEAN = 9 };

#define AT 0x40000000U /* of the slot */

static long pages;
static int vm, vcpu;
static struct kvm_run *run;
static char *memory;
static uint64_t *bitmap;

/* What shadow paging costs says nothing of a TDP. */
static void require_tdp_mmu(void)
{
	FILE *answer = fopen("/sys/module/kvm/parameters/tdp_mmu", "r");

	if (!answer || fgetc(answer) != 'Y') {
		fprintf(stderr, "KVM here has no TDP MMU\n");
		exit(2);
	}
	fclose(answer);
}

static int checked(int result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

static int64_t slot(uint32_t flags, uint64_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = 1, .flags = flags, .guest_phys_addr = AT, .memory_size = size,
		.userspace_addr = (uint64_t)memory,
	};
	int64_t start = now_ns();

	checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	return now_ns() - start;
}

static void put_code(unsigned char *code)
{
	uint32_t first = AT, end = AT + (uint32_t)(pages * PAGE);
	unsigned char loop[] = {
		0xbf, 0, 0, 0, 0,             /* mov edi, first */
		0x88, 0x07,                   /* mov [edi], al */
		0x81, 0xc7, 0, 0x10, 0, 0,    /* add edi, 4096 */
		0x81, 0xff, 0, 0, 0, 0,       /* cmp edi, end */
		0x72, 0xf0,                   /* jb -16 */
		0xf4,                         /* hlt */
	};

	memcpy(loop + 1, &first, 4);
	memcpy(loop + 15, &end, 4);
	memcpy(code, loop, sizeof(loop));
}

static void make_vm(int kvm, int manual)
{
	struct kvm_sregs sregs;
	unsigned char *low = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = { .memory_size = 16 * PAGE, .userspace_addr = (uint64_t)low };
	struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { 1 } };

	if (low == MAP_FAILED)
		die("mmap");
	vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	if (manual)
		checked(ioctl(vm, KVM_ENABLE_CAP, &cap), "KVM_ENABLE_CAP");
	checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	put_code(low + CODE_AT);
	vcpu = checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	size_t size = (size_t)checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("mmap");
	checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cr0 |= 1;
	struct kvm_segment flat = { .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1,
				    .g = 1 };

	sregs.cs = flat;
	flat.type = 3;
	flat.selector = 16;
	sregs.ds = sregs.es = sregs.ss = flat;
	checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
}

/* The guest stores to every page. */
static void touch(void)
{
	struct kvm_regs regs = { .rip = CODE_AT, .rflags = 2 };

	checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	checked(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_HLT) {
		fprintf(stderr, "the guest stopped for reason %u\n", run->exit_reason);
		exit(2);
	}
}

static int64_t get_log(void)
{
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bitmap };
	int64_t start = now_ns();

	checked(ioctl(vm, KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
	return now_ns() - start;
}

static void require_bits(long wanted)
{
	long set = 0;

	for (long i = 0; i < pages / 64; i++)
		set += __builtin_popcountl(bitmap[i]);
	if (set != wanted) {
		fprintf(stderr, "%ld pages are dirty, not %ld\n", set, wanted);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	pages = pages_of(count_argument(argc, argv));
	uint64_t size = (uint64_t)pages * PAGE;
	int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int64_t took[CLEAN];

	require_one_core();
	require_tdp_mmu();
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	bitmap = calloc((size_t)pages / 64, sizeof(*bitmap));
	if (memory == MAP_FAILED || !bitmap)
		die("mmap");
	checked(madvise(memory, size, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
	make_vm(kvm, 0);
	slot(0, size);
	touch();
	int64_t on = slot(KVM_MEM_LOG_DIRTY_PAGES, size);

	for (int i = 0; i < CLEAN; i++)
		took[i] = get_log();
	require_bits(0);
	qsort(took, CLEAN, sizeof(*took), by_time);
	touch();
	int64_t dirty = get_log();

	require_bits(pages);
	slot(0, size);
	touch();
	int64_t start = now_ns();

	checked(madvise(memory, size, MADV_DONTNEED), "MADV_DONTNEED");
	int64_t dontneed = now_ns() - start;

	touch();
	int64_t deleted = slot(0, 0);

	make_vm(kvm, 1);
	slot(0, size);
	touch();
	slot(KVM_MEM_LOG_DIRTY_PAGES, size);
	touch();
	get_log();
	require_bits(pages);
	struct kvm_clear_dirty_log clear = { .slot = 1, .num_pages = (uint32_t)pages, .dirty_bitmap = bitmap };

	start = now_ns();
	checked(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear), "KVM_CLEAR_DIRTY_LOG");
	int64_t cleared = now_ns() - start;

	printf("{\"p50\": %" PRId64 ", \"p99\": %" PRId64 ", \"parts\": {\"logging on\": %" PRId64
	       ", \"get clean\": %" PRId64 ", \"get all dirty\": %" PRId64 ", \"clear\": %" PRId64
	       ", \"delete a slot\": %" PRId64 ", \"DONTNEED\": %" PRId64 "}}\n",
	       dirty, dirty, on, took[CLEAN / 2], dirty, cleared, deleted, dontneed);
	return 0;
}
