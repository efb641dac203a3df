"""unmap: the host takes pages away while DMA runs, and the device never touches one after it was given up.

Round by round the host migrates the buffers' pages, drops the destination's (madvise DONTNEED), deletes
the memslot and adds it again, while the device copies all the time (RFC-77, RFC-87, RFC-94, RFC-95).
Every frame carries its owner; a single access to a frame given up is a violation of I6.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import trio

from protocol.hw.dsa import PAGE_REFUSED, Status
from qemu_shim.api import MIB, PAGE_SIZE, Context, DmaFailed, Guest, Param, RamSlot, Scenario
from qemu_shim.guest.dmatest import source_pattern

SLOT_GPA = 0x1_8000_0000
ZEROES = bytes(PAGE_SIZE)


@dataclass(slots=True)
class _Story:
    """Shared by the copying tasks and the host's rounds."""

    ctx: Context
    guest: Guest
    slot: RamSlot
    pages: int
    expected: bytes
    running: bool = True
    removed: bool = False  # the slot is being deleted: copies may fail
    removals: int = 0  # a copy may begin before one and be told of its failure after it
    copies: Counter[Status] = field(default_factory=Counter)
    copied: trio.Event = field(default_factory=trio.Event)  # the next success

    def src(self, page: int) -> int:
        return self.slot.gpa + page * PAGE_SIZE

    def dst(self, page: int) -> int:
        return self.slot.gpa + (self.pages + page) * PAGE_SIZE


async def play(ctx: Context) -> None:
    params, pages, rounds = ctx.params, ctx.params["pages"], ctx.params["rounds"]
    guest = await ctx.boot()
    slot = await guest.add_slot(max(2 * pages * PAGE_SIZE, MIB), SLOT_GPA)
    story = _Story(ctx, guest, slot, pages, source_pattern(PAGE_SIZE))
    for page in range(pages):
        await guest.write(story.src(page), story.expected)
    async with ctx.counted() as cost:
        async with trio.open_nursery() as nursery:
            for worker in range(params["workers"]):
                nursery.start_soon(_copy_all_the_time, story, worker, params["workers"])
            for number in range(rounds):
                await _take_away(story, number)
            story.running = False
        await _verify(story)
    copies, stale = story.copies, cost.stale_accesses
    ctx.expect(copies[Status.SUCCESS] >= rounds, "no copy succeeded between two rounds")
    ctx.expect_equal(stale, 0, "I6: stale accesses")
    ctx.say(f"{rounds} rounds of migrate, DONTNEED, slot delete and re-add under DMA")
    ctx.figures |= {
        "rounds": rounds,
        "copies": {status.name: count for status, count in copies.items()},
        "stale_accesses": stale,
    }
    refused = sum(copies[status] for status in PAGE_REFUSED)
    ctx.row("copies done / refused", f"{copies[Status.SUCCESS]} / {refused}")
    ctx.row("frames touched after given up", stale)


async def _copy_all_the_time(story: _Story, worker: int, workers: int) -> None:
    """One outstanding copy after the other, over this worker's share of the pages.  DmaFailed: the device
    is lost to us, and rounds that wait for the next success would never end.
    """
    while story.running:
        for page in range(worker, story.pages, workers):
            could_fail, before = story.removed, story.removals
            record = await story.guest.queue.memmove(story.dst(page), story.src(page), PAGE_SIZE)
            story.copies[record.status] += 1
            if record.status is Status.SUCCESS:
                story.copied.set()
                story.copied = trio.Event()
            allowed = record.status in PAGE_REFUSED and (could_fail or story.removals != before)
            if record.status is not Status.SUCCESS and not allowed:
                raise DmaFailed(f"copy of page {page} with the slot in place", record)
            if not story.running:
                break
        await trio.lowlevel.checkpoint()


async def _take_away(story: _Story, number: int) -> None:
    """One round of the host's."""
    guest, slot, half = story.guest, story.slot, story.pages * PAGE_SIZE
    await guest.migrate(slot.gpa, 2 * half)
    await guest.discard(slot.gpa + half, half)
    story.removed = True
    story.removals += 1
    await guest.machine.vm.set_user_memory_region(slot.slot, 0, 0, 0)  # and its memory stays
    await trio.sleep(0.001 * (number % 3))
    await guest.machine.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva)
    await guest.machine.portal.drain()
    story.removed = False
    # The next round takes away pages that are in use again.
    await story.copied.wait()


async def _verify(story: _Story) -> None:
    """Sources kept their bytes through every migration; destinations hold a copy, or zeroes since the last
    drop.
    """
    for page in range(story.pages):
        story.ctx.expect_equal(await story.guest.read(story.src(page)), story.expected, f"source page {page}")
        target = await story.guest.read(story.dst(page))
        held = target in (story.expected, ZEROES)
        story.ctx.expect(held, f"destination page {page} holds foreign bytes")


SCENARIO = Scenario(
    name="unmap",
    summary="the host migrates, drops and unplugs memory under running DMA; no frame is touched too late",
    tags=("RFC-77", "RFC-87", "RFC-94", "RFC-95"),
    play=play,
    params={
        "pages": Param(32, 1, 4096, "pages copied"),
        "rounds": Param(20, 1, 100_000, "rounds of taking away"),
        "workers": Param(4, 1, 16, "copies in flight"),
    },
    designs=("shared",),
)
