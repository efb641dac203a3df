"""unmap: the host takes pages away while DMA runs, and the device never touches one after it was given up.

Round by round the host migrates the buffers' pages, drops the destination's (madvise DONTNEED), deletes
the memslot and adds it again, while the device copies all the time (RFC-77, RFC-87, RFC-94, RFC-95).
Every frame carries its owner; a single access to a frame given up is a violation of I6.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import trio

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.guest.dmatest import source_pattern
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import Report, check_system, fill_table, snapshot
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.vmm.designs import SHARED, RamSlot
from qemu_shim.vmm.machine import Machine, MachineConfig, machine

SLOT = 7
SLOT_GPA = 0x1_8000_0000
ZEROES = bytes(PAGE_SIZE)


@dataclass(slots=True)
class _Story:
    """Shared by the copying tasks and the host's rounds."""

    machine: Machine
    queue: IdxdWorkQueue
    slot: RamSlot
    pages: int
    expected: bytes
    running: bool = True
    removed: bool = False  # the slot is being deleted: copies may fail
    removals: int = 0  # a copy may begin before one and be told of its failure after it
    copies: Counter[Status] = field(default_factory=Counter)
    copied: trio.Event = field(default_factory=trio.Event)  # the next success
    unexpected: list[str] = field(default_factory=list)

    def src(self, page: int) -> int:
        return self.slot.gpa + page * PAGE_SIZE

    def dst(self, page: int) -> int:
        return self.slot.gpa + (self.pages + page) * PAGE_SIZE


async def play(ctx: Context) -> None:
    host, params, report = ctx.host, ctx.params, ctx.report
    pages, rounds = params["pages"], params["rounds"]
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        slot = await guest.add_slot(SLOT, SLOT_GPA, max(2 * pages * PAGE_SIZE, MIB))
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        story = _Story(guest, queue, slot, pages, source_pattern(PAGE_SIZE))
        for page in range(pages):
            await guest.memory.write(story.src(page), story.expected)
        before = await snapshot(host)
        async with trio.open_nursery() as nursery:
            for worker in range(params["workers"]):
                nursery.start_soon(_copy_all_the_time, story, worker, params["workers"])
            for number in range(rounds):
                await _take_away(story, number)
            story.running = False
        await _verify(story, report)
        await guest.portal.drain()
        after = await snapshot(host)
        await check_system(host, report)
    report.problems += story.unexpected
    stale = after.since(before).stale_accesses
    report.expect(story.copies[Status.SUCCESS] >= rounds, "no copy succeeded between two rounds")
    report.expect(stale == 0, f"I6: {stale} stale accesses")
    report.lines.append(f"{rounds} rounds of migrate, DONTNEED, slot delete and re-add under DMA")
    report.figures |= {
        "rounds": rounds,
        "copies": {status.name: count for status, count in story.copies.items()},
        "stale_accesses": stale,
    }
    report.rows += [
        ("copies done / refused", f"{story.copies[Status.SUCCESS]} / {story.copies[Status.PAGE_FAULT_IR]}"),
        ("frames touched after given up", f"{stale}"),
    ]
    fill_table(report, before, after)


async def _copy_all_the_time(story: _Story, worker: int, workers: int) -> None:
    """One outstanding copy after the other, over this worker's share of the pages."""
    while story.running:
        for page in range(worker, story.pages, workers):
            could_fail, before = story.removed, story.removals
            record = await story.queue.memmove(story.dst(page), story.src(page), PAGE_SIZE)
            story.copies[record.status] += 1
            if record.status is Status.SUCCESS:
                story.copied.set()
                story.copied = trio.Event()
            allowed = record.status is Status.PAGE_FAULT_IR and (could_fail or story.removals != before)
            if record.status is not Status.SUCCESS and not allowed:
                story.unexpected.append(f"copy of page {page}: {record.status.name} with the slot in place")
            if not story.running:
                break
        await trio.lowlevel.checkpoint()


async def _take_away(story: _Story, number: int) -> None:
    """One round of the host's."""
    guest, slot, size = story.machine, story.slot, 2 * story.pages * PAGE_SIZE
    await guest.process.move_pages(slot.hva, size)
    await guest.process.madvise_dontneed(slot.hva + story.pages * PAGE_SIZE, story.pages * PAGE_SIZE)
    story.removed = True
    story.removals += 1
    await guest.vm.set_user_memory_region(SLOT, 0, 0, 0)
    await trio.sleep(0.001 * (number % 3))
    await guest.vm.set_user_memory_region(SLOT, slot.gpa, slot.size, slot.hva)
    await guest.portal.drain()
    story.removed = False
    # The next round takes away pages that are in use again.
    await story.copied.wait()


async def _verify(story: _Story, report: Report) -> None:
    """Sources kept their bytes through every migration; destinations hold a copy, or zeroes since the last
    drop.
    """
    guest = story.machine
    for page in range(story.pages):
        source = await guest.memory.read(story.src(page), PAGE_SIZE)
        report.expect(source == story.expected, f"source page {page} lost its contents")
        target = await guest.memory.read(story.dst(page), PAGE_SIZE)
        report.expect(target in (story.expected, ZEROES), f"destination page {page} holds foreign bytes")


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
    designs=(SHARED.name,),
)
