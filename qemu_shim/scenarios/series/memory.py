"""memory: the host manages the guest's memory as any other process's, under running DMA (RFC-87, RFC-94).

Nothing is pinned, so it may.  Workers have the device write a page and copy it, and compare what the VMM's
process then reads, all the time; meanwhile the host does what it does.  No data is lost, no frame touched
after it was given up, and the table tells what each action costs.  Only a hole shows: it reads as zeroes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, Param, RamSlot, Scenario

ANON_GPA, FILE_GPA, FILE_SLOT = 0x1_8000_0000, 0x2_0000_0000, 8
HUGE = 2 * MIB
UNTOLD = ("split",)  # may find no entry of KVM's to take away
TOLD = ("affected", "flushes", "io_faults", "retries")


@dataclass(slots=True)
class _Memory:
    ctx: Context
    guest: Guest
    anon: RamSlot
    file: RamSlot
    punch: Callable[[int, int], Awaitable[None]]  # a hole into the file, of so many bytes from there on
    pages: int
    running: bool = True
    copies: int = 0
    holes: int = 0
    copied: dict[int, trio.Event] = field(default_factory=dict)

    async def work(self, worker: int, workers: int) -> None:
        """This worker's share of the pages, over and over; every fourth goes by way of the file."""
        value = worker
        while self.running:
            for page in range(worker, self.pages, workers):
                value += workers
                through = self.file if page % 4 == 3 else self.anon
                await self._copy(through, page, value)
                self.copied.setdefault(worker, trio.Event()).set()
                if not self.running:
                    return

    async def _copy(self, through: RamSlot, page: int, value: int) -> None:
        at = page * PAGE_SIZE
        target = self.pages * PAGE_SIZE + at
        await self.guest.fill(through.gpa + at, pattern=value)
        await self.guest.copy(self.anon.gpa + target, through.gpa + at)
        found = await self.guest.machine.process.read(self.anon.hva + target, PAGE_SIZE)
        self.copies += 1
        if found == bytes(PAGE_SIZE) and through is self.file:
            self.holes += 1
            return
        words = value.to_bytes(8, "little") * (PAGE_SIZE // 8)
        self.ctx.expect_equal(found, words, f"page {page}: what was copied")

    async def everybody_copied(self) -> None:
        """Each worker has got through a copy since we began to wait."""
        self.copied = {worker: trio.Event() for worker in self.copied}
        for event in list(self.copied.values()):
            await event.wait()

    async def act(self, action: str, slot: RamSlot) -> int:
        return await self.guest.machine.process.host_action(action, slot.hva, slot.size)

    async def fork(self) -> int:
        """The child's memory is what it was at that moment, whatever DMA the parent does."""
        child = await self.guest.machine.process.fork()
        first = [await child.read(self.anon.hva + n * PAGE_SIZE, PAGE_SIZE) for n in range(self.pages)]
        await self.everybody_copied()
        again = [await child.read(self.anon.hva + n * PAGE_SIZE, PAGE_SIZE) for n in range(self.pages)]
        self.ctx.expect(first == again, "fork: DMA of the parent changed the child's memory")
        child.close()
        return self.pages

    async def punch_hole(self) -> int:
        await self.punch(0, self.file.size)
        return self.file.size // PAGE_SIZE


def _actions(memory: _Memory) -> dict[str, Callable[[], Awaitable[int]]]:
    names = ("swap_out", "migrate", "merge", "numa_hint", "age", "collapse", "split")
    return {
        **{name: partial(memory.act, name, memory.anon) for name in names},
        "migrate file": partial(memory.act, "migrate", memory.file),
        "fork": memory.fork,
        "punch hole": memory.punch_hole,
    }


async def play(ctx: Context) -> None:
    params = ctx.params
    costs: dict[str, Counter[str]] = {}
    guest = await ctx.boot(records_present=True)
    size, process = params["pages"] * PAGE_SIZE, guest.machine.process
    anon = await _anonymous(guest, params["pages"])
    file = await process.memfd("ram", size)
    slot = RamSlot(FILE_SLOT, FILE_GPA, size, await process.mmap(size, kind="file_shared", file=file))
    await guest.machine.vm.set_user_memory_region(slot.slot, slot.gpa, size, slot.hva)
    memory = _Memory(ctx, guest, anon, slot, file.punch_hole, params["pages"])
    async with trio.open_nursery() as nursery:
        for worker in range(params["workers"]):
            memory.copied[worker] = trio.Event()
            nursery.start_soon(memory.work, worker, params["workers"])
        for _ in range(params["rounds"]):
            for name, action in _actions(memory).items():
                of_all = costs.setdefault(name, Counter(dict.fromkeys(TOLD, 0)))
                of_all.update(await _cost(memory, action))
        memory.running = False
    file.close()
    for name, cost in costs.items():
        ctx.row(f"{name}: pages, flushes, requests, retries", ", ".join(map(str, cost.values())))
        ctx.expect(cost["affected"] > 0, f"{name}: did nothing")
        ctx.expect(cost["flushes"] > 0 or name in UNTOLD, f"{name}: nobody was told")
    ctx.row("copies verified / of holes", f"{memory.copies} / {memory.holes}")
    ctx.figures |= {"copies": memory.copies, "copies_of_holes": memory.holes, "actions": costs}


async def _anonymous(guest: Guest, pages: int) -> RamSlot:
    """Sources and copies in memory that may be huge and be merged; more sources are in the file."""
    anon = await guest.add_slot(max(2 * pages * PAGE_SIZE, HUGE), ANON_GPA)
    await guest.machine.process.madvise(anon.hva, anon.size, "mergeable")
    return anon


async def _cost(memory: _Memory, action: Callable[[], Awaitable[int]]) -> dict[str, int]:
    """Of one action, and of the next copies, which meet what it left."""
    async with memory.ctx.counted(at_rest=False) as cost:
        affected = await action()
        await memory.everybody_copied()
    counts = (cost.flushes, cost.io_faults, cost.fault_retries)
    return dict(zip(TOLD, (affected, *counts), strict=True))


SCENARIO = Scenario(
    name="memory",
    summary="the host swaps, migrates, merges, collapses, forks, ages, punches holes under running DMA",
    tags=("Pinning can be avoided", "Auto NUMA balance", "RFC-77", "RFC-87", "RFC-94"),
    play=play,
    params={
        "pages": Param(64, 4, 4096, "pages in use"),
        "workers": Param(4, 1, 16, "copies in flight"),
        "rounds": Param(2, 1, 10_000, "times the host does everything"),
    },
    designs=("shared",),
)
