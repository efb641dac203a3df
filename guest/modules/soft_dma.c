// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * A DMA channel that is a loop: something for dma_check to be right about where there is no accelerator.  With
 * `spoil` it does wrong what a device may: 1 loses the last byte, 2 writes one too many, 3 changes the source,
 * 4 says that it failed, 5 never ends.
 */
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

static unsigned int spoil;
module_param(spoil, uint, 0644);

struct copy {
	struct dma_async_tx_descriptor tx;
	struct list_head in;
	u8 *to, *from; /* memory of this kernel: no IOMMU is between */
	size_t bytes;
};

static struct platform_device *home;
static struct dma_device device;
static struct dma_chan chan;
static DEFINE_SPINLOCK(lock);
static LIST_HEAD(submitted);
static LIST_HEAD(issued);

static void make(struct copy *copy)
{
	struct dmaengine_result result = { .result = spoil == 4 ? DMA_TRANS_ABORTED : DMA_TRANS_NOERROR };

	memcpy(copy->to, copy->from, copy->bytes - (spoil == 1));
	if (spoil == 2)
		copy->to[copy->bytes] ^= 1;
	if (spoil == 3)
		copy->from[0] ^= 1;
	chan.completed_cookie = copy->tx.cookie;
	if (copy->tx.callback_result)
		copy->tx.callback_result(copy->tx.callback_param, &result);
	else if (copy->tx.callback)
		copy->tx.callback(copy->tx.callback_param);
}

static void on_work(struct work_struct *work)
{
	struct copy *copy;

	if (spoil == 5)
		return;
	for (;;) {
		spin_lock_bh(&lock);
		copy = list_first_entry_or_null(&issued, struct copy, in);
		if (copy)
			list_del(&copy->in);
		spin_unlock_bh(&lock);
		if (!copy)
			return;
		make(copy);
		kfree(copy);
	}
}

static DECLARE_WORK(work, on_work);

static dma_cookie_t submit(struct dma_async_tx_descriptor *tx)
{
	spin_lock_bh(&lock);
	tx->cookie = chan.cookie = chan.cookie < DMA_MIN_COOKIE ? DMA_MIN_COOKIE : chan.cookie + 1;
	list_add_tail(&container_of(tx, struct copy, tx)->in, &submitted);
	spin_unlock_bh(&lock);
	return tx->cookie;
}

static struct dma_async_tx_descriptor *prepare(struct dma_chan *of, dma_addr_t to, dma_addr_t from, size_t bytes,
					       unsigned long flags)
{
	struct copy *copy = kzalloc(sizeof(*copy), GFP_NOWAIT);

	if (!copy)
		return NULL;
	dma_async_tx_descriptor_init(&copy->tx, of);
	copy->tx.flags = flags;
	copy->tx.tx_submit = submit;
	copy->to = phys_to_virt(to);
	copy->from = phys_to_virt(from);
	copy->bytes = bytes;
	return &copy->tx;
}

static void issue(struct dma_chan *of)
{
	spin_lock_bh(&lock);
	list_splice_tail_init(&submitted, &issued);
	spin_unlock_bh(&lock);
	schedule_work(&work);
}

static enum dma_status status(struct dma_chan *of, dma_cookie_t cookie, struct dma_tx_state *state)
{
	dma_set_tx_state(state, of->completed_cookie, of->cookie, 0);
	return dma_async_is_complete(cookie, of->completed_cookie, of->cookie);
}

static int terminate(struct dma_chan *of)
{
	struct copy *copy, *next;
	LIST_HEAD(dropped);

	spin_lock_bh(&lock);
	list_splice_init(&submitted, &dropped);
	list_splice_init(&issued, &dropped);
	spin_unlock_bh(&lock);
	list_for_each_entry_safe(copy, next, &dropped, in)
		kfree(copy);
	return 0;
}

static void settle(struct dma_chan *of)
{
	flush_work(&work);
}

static void release(struct dma_device *of)
{
}

static int __init probe(struct platform_device *of)
{
	int error = dma_coerce_mask_and_coherent(&of->dev, DMA_BIT_MASK(64));

	if (error)
		return error;
	device.dev = &of->dev;
	device.device_prep_dma_memcpy = prepare;
	device.device_issue_pending = issue;
	device.device_tx_status = status;
	device.device_terminate_all = terminate;
	device.device_synchronize = settle;
	device.device_release = release;
	INIT_LIST_HEAD(&device.channels);
	chan.device = &device;
	list_add_tail(&chan.device_node, &device.channels);
	dma_cap_set(DMA_MEMCPY, device.cap_mask);
	dma_cap_set(DMA_PRIVATE, device.cap_mask);
	return dma_async_device_register(&device);
}

static int leave(struct platform_device *of)
{
	dma_async_device_unregister(&device);
	return 0;
}

static struct platform_driver driver = { .remove = leave, .driver = { .name = "soft_dma" } };

static int __init soft_dma_init(void)
{
	home = platform_create_bundle(&driver, probe, NULL, 0, NULL, 0);
	return PTR_ERR_OR_ZERO(home);
}

static void __exit soft_dma_exit(void)
{
	platform_device_unregister(home);
	platform_driver_unregister(&driver);
}

module_init(soft_dma_init);
module_exit(soft_dma_exit);
MODULE_DESCRIPTION("A DMA channel in software, right or wrong");
MODULE_LICENSE("Dual MIT/GPL");
