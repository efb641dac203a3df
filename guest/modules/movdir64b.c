// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * MOVDIR64B for a CPU that lacks it, as QEMU's TCG does: idxd hands descriptors to its device with nothing else.
 *
 * The kernel has one encoding of it, 64 bytes from (%rdx) to the address in %rax.  From the #UD of that one it
 * is done by eight stores, and execution goes on behind it; every other #UD is somebody else's.  The CPU's bit
 * says that it is there.  Not atomic, as the instruction is: the device's portal takes the eight in order.
 */
#include <linux/io.h>
#include <linux/kdebug.h>
#include <linux/module.h>
#include <linux/ptrace.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <asm/cpufeature.h>
#include <asm/special_insns.h>
#include <asm/trapnr.h>

static const u8 instruction[] = { 0x66, 0x0f, 0x38, 0xf8, 0x02 };
static unsigned long emulated;
static bool lacked;

static int on_trap(struct notifier_block *block, unsigned long event, void *data)
{
	struct die_args *trap = data;
	u8 found[sizeof(instruction)];
	const u64 *from;
	u64 __iomem *to;
	int i;

	if (event != DIE_TRAP || trap->trapnr != X86_TRAP_UD || user_mode(trap->regs))
		return NOTIFY_DONE;
	if (copy_from_kernel_nofault(found, (void *)trap->regs->ip, sizeof(found)) ||
	    memcmp(found, instruction, sizeof(found)))
		return NOTIFY_DONE;
	from = (const u64 *)trap->regs->dx;
	to = (u64 __iomem *)trap->regs->ax;
	for (i = 0; i < 8; i++)
		__raw_writeq(from[i], to + i);
	trap->regs->ip += sizeof(found);
	emulated++;
	return NOTIFY_STOP;
}

static struct notifier_block on_ud = { .notifier_call = on_trap };

/* Of 64 bytes that are moved all arrive, and no more. */
static bool moves(void)
{
	u8 *room = kzalloc(4 * 64, GFP_KERNEL); /* of a power of two, so aligned to it */
	bool right;
	int i;

	if (!room)
		return false;
	for (i = 0; i < 64; i++)
		room[i] = 0x80 | i;
	movdir64b((void __iomem *)(room + 128), room);
	right = !memcmp(room + 128, room, 64) && !memchr_inv(room + 64, 0, 64) && !memchr_inv(room + 192, 0, 64);
	kfree(room);
	return right;
}

static int __init movdir64b_init(void)
{
	bool right;

	lacked = !boot_cpu_has(X86_FEATURE_MOVDIR64B);
	if (lacked) {
		int error = register_die_notifier(&on_ud);

		if (error)
			return error;
		set_cpu_cap(&boot_cpu_data, X86_FEATURE_MOVDIR64B);
	}
	right = moves() && (!lacked || emulated == 1);
	pr_notice("guest: result movdir64b %s by=%s\n", right ? "ok" : "failed", lacked ? "stores" : "cpu");
	return 0;
}

static void __exit movdir64b_exit(void)
{
	if (!lacked)
		return;
	clear_bit(X86_FEATURE_MOVDIR64B, (unsigned long *)boot_cpu_data.x86_capability);
	unregister_die_notifier(&on_ud);
}

module_init(movdir64b_init);
module_exit(movdir64b_exit);
module_param(emulated, ulong, 0444);
MODULE_DESCRIPTION("MOVDIR64B by eight stores");
MODULE_LICENSE("Dual MIT/GPL");
