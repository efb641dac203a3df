// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Block on fault, as the RFC's author had it by a change of the driver: idxd has a switch for the work queue
 * (sysfs, block_on_fault), and never sets the flag in a descriptor that makes use of it.  Here each memory move
 * gets it on its way to the device; idxd stays as Debian built it.
 *
 * Load it after idxd.  Relies on `struct idxd_desc` beginning with the pointer to the descriptor.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <uapi/linux/idxd.h>

static unsigned long flagged;

/* int idxd_submit_desc(struct idxd_wq *wq, struct idxd_desc *desc) */
static int on_submit(struct kprobe *probe, struct pt_regs *regs)
{
	struct dsa_hw_desc *descriptor = *(struct dsa_hw_desc **)regs->si;

	if (descriptor->opcode == DSA_OPCODE_MEMMOVE) {
		descriptor->flags |= IDXD_OP_FLAG_BOF;
		flagged++;
	}
	return 0;
}

static struct kprobe submit = { .symbol_name = "idxd_submit_desc", .pre_handler = on_submit };

static int __init block_on_fault_init(void)
{
	int error = register_kprobe(&submit);

	if (error)
		pr_notice("guest: result block_on_fault failed error=%d\n", error);
	else
		pr_notice("guest: result block_on_fault ok\n");
	return error;
}

static void __exit block_on_fault_exit(void)
{
	unregister_kprobe(&submit);
}

module_init(block_on_fault_init);
module_exit(block_on_fault_exit);
module_param(flagged, ulong, 0444);
MODULE_DESCRIPTION("Block on fault in each memory move that idxd submits");
MODULE_LICENSE("Dual MIT/GPL");
