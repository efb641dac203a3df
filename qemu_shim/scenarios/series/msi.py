"""msi: 0xfee00000 to 0xfeefffff is no memory for a device, whatever KVM has there.

The RFC asks how MSI pages are to be mapped where an IOMMU translates them; on x86 none is: a write of four
aligned bytes is an interrupt message, which reaches the VMM, and anything else there is a fault.  So the
device never reaches a memslot over the window, RAM to the vCPU, and nothing has to be mapped or pinned.
"""

from __future__ import annotations

from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.scenarios.series.common import FILLED, PATTERN

START, BYTES = 0xFEE0_0000, MIB
VECTOR = 0x4021


async def play(ctx: Context) -> None:
    count = ctx.params["interrupts"]
    found: dict[str, int] = {}
    guest = await ctx.boot(records_present=True)
    (source,) = guest.pages(1)
    await guest.write(source, FILLED)
    for where in ("nothing", "a memslot"):
        if where == "a memslot":
            await guest.add_slot(BYTES, START)
            for page in range(START, START + BYTES, PAGE_SIZE):
                await guest.write(page, FILLED)
        async with ctx.counted() as cost:
            delivered = await _messages(ctx, guest, count)
            refused = await _others(ctx, guest, source)
        ctx.expect_equal(cost.interrupts, count, "interrupt messages")
        ctx.expect_equal(cost.faults_recorded, refused, "faults recorded")
        ctx.expect_equal(cost.io_faults, 0, "page requests for the window")
        ctx.say(f"{where} behind the window: {delivered} messages, {refused} faults")
        found |= {"interrupts": delivered, "faults": refused}
    await _untouched(ctx, guest)
    ctx.figures |= found | {"window_pages": BYTES // PAGE_SIZE}
    ctx.row("interrupt messages, each way", found["interrupts"])
    ctx.row("other accesses refused, each way", found["faults"])
    ctx.row("pages of the memslot unchanged", BYTES // PAGE_SIZE)


async def _messages(ctx: Context, guest: Guest, count: int) -> int:
    """Aligned writes of four bytes over the whole window; how many of them reached the VMM as they were."""
    arrived = guest.machine.portal.messages
    arrived.clear()
    sent = [(START + n * BYTES // count // 4 * 4, VECTOR + n) for n in range(count)]
    for addr, data in sent:
        await guest.fill(addr, 4, data)
    ctx.expect_equal(list(arrived), sent, "messages that reached the VMM")
    return len(arrived)


async def _others(ctx: Context, guest: Guest, source: int) -> int:
    """Reads, and writes of any other size: each fails and is recorded; how many that were."""
    last = START + BYTES - 4
    attempts = [
        guest.copy(source, START, 4),
        guest.copy(source, START),
        guest.copy(source, last, 4),
        *[guest.fill(START, size, PATTERN) for size in (1, 2, 8, PAGE_SIZE)],
        guest.fill(START + 2, 4, PATTERN),
        guest.fill(last + 2, 2, PATTERN),
        guest.copy(START, source),
    ]
    for number, attempt in enumerate(attempts):
        await ctx.expect_dma_fault(f"what is no message, {number}", attempt)
    ctx.expect_equal(await guest.read(source), FILLED, "the target of the reads")
    return len(attempts)


async def _untouched(ctx: Context, guest: Guest) -> None:
    for page in range(START, START + BYTES, PAGE_SIZE):
        ctx.expect_equal(await guest.read(page), FILLED, f"the memslot's page {page:#x}")


SCENARIO = Scenario(
    name="msi",
    summary="a DMA write of 4 bytes to 0xfeexxxxx is an interrupt message, all else a fault, RAM or not",
    tags=("How to map MSI pages",),
    play=play,
    params={"interrupts": Param(64, 1, 1024, "interrupt messages, spread over the window, each way")},
    designs=("shared",),
)
