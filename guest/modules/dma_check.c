// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Copies by a DMA channel, each compared byte by byte: source, destination and what is around it.  One line a
 * test.  The kernel's dmatest does more; this is here because Debian's kernel is built without it.
 */
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/slab.h>

static unsigned int tests = 10;
static unsigned int bytes = 4096; /* at most, of one copy */
static unsigned int wait_ms = 60000;
static char *channel = ""; /* by name, such as dma0chan0; else the first that copies */
module_param(tests, uint, 0444);
module_param(bytes, uint, 0444);
module_param(wait_ms, uint, 0444);
module_param(channel, charp, 0444);

struct ending {
	struct completion done;
	enum dmaengine_tx_result how;
};

static void on_end(void *context, const struct dmaengine_result *result)
{
	struct ending *ending = context;

	if (result)
		ending->how = result->result;
	complete(&ending->done);
}

static u8 pattern(unsigned int test, unsigned int i)
{
	return (test * 97 + i * 31 + (i >> 8) * 7) ^ (i >> 3);
}

#define UNTOUCHED 0xee
#define AROUND PAGE_SIZE /* before and behind what is copied */

static size_t room(void)
{
	return bytes + 2 * AROUND;
}

/* NULL, or what is wrong, after the copy of `length` bytes at `at` from one room to the other. */
static const char *compare(unsigned int test, const u8 *from, const u8 *to, size_t at, size_t length)
{
	size_t i;

	for (i = 0; i < room(); i++) {
		bool copied = i >= at && i < at + length;

		if (from[i] != pattern(test, i))
			return "source";
		if (copied && to[i] != pattern(test, i))
			return "copied";
		if (!copied && to[i] != UNTOUCHED)
			return "beside";
	}
	return NULL;
}

/* NULL, or what is wrong.  A copy that may still be under way keeps its buffers: `leak`. */
static const char *transfer(struct dma_chan *chan, dma_addr_t to, dma_addr_t from, size_t length, bool *leak)
{
	struct ending *ending = kzalloc(sizeof(*ending), GFP_KERNEL);
	struct dma_async_tx_descriptor *tx;
	const char *wrong = NULL;

	if (!ending)
		return "memory";
	init_completion(&ending->done);
	ending->how = DMA_TRANS_NOERROR;
	tx = dmaengine_prep_dma_memcpy(chan, to, from, length, DMA_PREP_INTERRUPT | DMA_CTRL_ACK);
	if (!tx) {
		wrong = "prepare";
		goto out;
	}
	tx->callback_result = on_end;
	tx->callback_param = ending;
	if (dma_submit_error(dmaengine_submit(tx))) {
		wrong = "submit";
		goto out;
	}
	dma_async_issue_pending(chan);
	if (!wait_for_completion_timeout(&ending->done, msecs_to_jiffies(wait_ms))) {
		*leak = dmaengine_terminate_sync(chan);
		wrong = "timeout";
	} else if (ending->how != DMA_TRANS_NOERROR) {
		wrong = "error";
	}
out:
	if (!*leak)
		kfree(ending);
	return wrong;
}

static const char *mapped(struct dma_chan *chan, u8 *to, u8 *from, size_t at, size_t length, bool *leak)
{
	struct device *device = chan->device->dev;
	dma_addr_t source, destination;
	const char *wrong = "map";

	source = dma_map_single(device, from, room(), DMA_TO_DEVICE);
	if (dma_mapping_error(device, source))
		return wrong;
	destination = dma_map_single(device, to, room(), DMA_BIDIRECTIONAL);
	if (!dma_mapping_error(device, destination)) {
		wrong = transfer(chan, destination + at, source + at, length, leak);
		dma_unmap_single(device, destination, room(), DMA_BIDIRECTIONAL);
	}
	dma_unmap_single(device, source, room(), DMA_TO_DEVICE);
	return wrong;
}

static bool passes(struct dma_chan *chan, unsigned int test)
{
	unsigned int order = get_order(room());
	/* whole pages and pieces by turns */
	size_t length = test & 1 ? bytes / 2 : bytes;
	size_t at = AROUND + (test & 1 ? (test * 13) % (bytes / 2) : 0);
	size_t i;
	u8 *from = (u8 *)__get_free_pages(GFP_KERNEL, order);
	u8 *to = (u8 *)__get_free_pages(GFP_KERNEL, order);
	const char *wrong = "memory";
	bool leak = false;
	ktime_t start = ktime_get();

	if (from && to) {
		for (i = 0; i < room(); i++)
			from[i] = pattern(test, i);
		memset(to, UNTOUCHED, room());
		start = ktime_get();
		wrong = mapped(chan, to, from, at, length, &leak);
		if (!wrong)
			wrong = compare(test, from, to, at, length);
	}
	if (wrong)
		pr_notice("guest: result dma_check.%u failed wrong=%s bytes=%zu\n", test, wrong, length);
	else
		pr_notice("guest: result dma_check.%u ok bytes=%zu us=%lld\n", test, length,
			  ktime_us_delta(ktime_get(), start));
	if (!leak) {
		free_pages((unsigned long)from, order);
		free_pages((unsigned long)to, order);
	}
	return !wrong;
}

static bool is_asked_for(struct dma_chan *chan, void *unused)
{
	return !*channel || !strcmp(dma_chan_name(chan), channel);
}

static int __init dma_check_init(void)
{
	unsigned int test, passed = 0;
	struct dma_chan *chan;
	dma_cap_mask_t mask;

	if (bytes < 2 || get_order(room()) > MAX_ORDER - 1)
		return -EINVAL;
	dma_cap_zero(mask);
	dma_cap_set(DMA_MEMCPY, mask);
	chan = dma_request_channel(mask, is_asked_for, NULL);
	if (!chan) {
		pr_notice("guest: result dma_check absent\n");
		return 0;
	}
	for (test = 0; test < tests; test++)
		passed += passes(chan, test);
	pr_notice("guest: result dma_check %s channel=%s passed=%u of=%u\n", passed == tests ? "ok" : "failed",
		  dma_chan_name(chan), passed, tests);
	dma_release_channel(chan);
	return 0;
}

static void __exit dma_check_exit(void)
{
}

module_init(dma_check_init);
module_exit(dma_check_exit);
MODULE_DESCRIPTION("Copies by a DMA channel, compared");
MODULE_LICENSE("Dual MIT/GPL");
