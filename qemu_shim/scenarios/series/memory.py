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

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.stage import Stage, staged
from qemu_shim.vmm.designs import SHARED, RamSlot
from qemu_shim.vmm.machine import MachineConfig
from qemu_shim.vmm.process import MemFd

ANON_SLOT, FILE_SLOT = 7, 8
ANON_GPA, FILE_GPA = 0x1_8000_0000, 0x2_0000_0000
HUGE = 2 * MIB
UNTOLD = ("split",)  # may find no entry of KVM's to take away
TOLD = ("affected", "flushes", "io_faults", "retries")


@dataclass(slots=True)
class _Memory:
    stage: Stage
    anon: RamSlot
    file: RamSlot
    memfd: MemFd
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
        stage, report, at = self.stage, self.stage.report, page * PAGE_SIZE
        target = self.pages * PAGE_SIZE + at
        statuses = [
            await stage.fill(through.gpa + at, value),
            await stage.copy(self.anon.gpa + target, through.gpa + at),
        ]
        report.expect_equal(statuses, [Status.SUCCESS] * 2, f"DMA to page {page}")
        found = await stage.guest.process.read(self.anon.hva + target, PAGE_SIZE)
        self.copies += 1
        if found == bytes(PAGE_SIZE) and through is self.file:
            self.holes += 1
        elif found != value.to_bytes(8, "little") * (PAGE_SIZE // 8):
            report.problems.append(f"page {page}: not the {value} that was copied but {found[:8].hex()}")

    async def everybody_copied(self) -> None:
        """Each worker has got through a copy since we began to wait."""
        self.copied = {worker: trio.Event() for worker in self.copied}
        for event in list(self.copied.values()):
            await event.wait()

    async def act(self, action: str, slot: RamSlot) -> int:
        return await self.stage.guest.process.host_action(action, slot.hva, slot.size)

    async def fork(self) -> int:
        """The child's memory is what it was at that moment, whatever DMA the parent does."""
        child = await self.stage.guest.process.fork()
        first = [await child.read(self.anon.hva + n * PAGE_SIZE, PAGE_SIZE) for n in range(self.pages)]
        await self.everybody_copied()
        again = [await child.read(self.anon.hva + n * PAGE_SIZE, PAGE_SIZE) for n in range(self.pages)]
        self.stage.report.expect(first == again, "fork: DMA of the parent changed the child's memory")
        child.close()
        return self.pages

    async def punch_hole(self) -> int:
        await self.memfd.punch_hole(0, self.file.size)
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
    params, report = ctx.params, ctx.report
    costs: dict[str, Counter[str]] = {}
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        memory = await _prepared(stage, params["pages"])
        async with trio.open_nursery() as nursery:
            for worker in range(params["workers"]):
                memory.copied[worker] = trio.Event()
                nursery.start_soon(memory.work, worker, params["workers"])
            for _ in range(params["rounds"]):
                for name, action in _actions(memory).items():
                    costs.setdefault(name, Counter(dict.fromkeys(TOLD, 0))).update(
                        await _cost(memory, action)
                    )
            memory.running = False
        memory.memfd.close()
    for name, cost in costs.items():
        report.rows.append((f"{name}: pages, flushes, requests, retries", ", ".join(map(str, cost.values()))))
        report.expect(cost["affected"] > 0, f"{name}: did nothing")
        report.expect(cost["flushes"] > 0 or name in UNTOLD, f"{name}: nobody was told")
    report.rows.append(("copies verified / of holes", f"{memory.copies} / {memory.holes}"))
    report.figures |= {"copies": memory.copies, "copies_of_holes": memory.holes, "actions": costs}


async def _prepared(stage: Stage, pages: int) -> _Memory:
    """Sources and copies in anonymous memory that may be huge and be merged; more sources in a file."""
    guest = stage.guest
    anon = await guest.add_slot(ANON_SLOT, ANON_GPA, max(2 * pages * PAGE_SIZE, HUGE))
    await guest.process.madvise(anon.hva, anon.size, "mergeable")
    memfd = await guest.process.memfd("ram", pages * PAGE_SIZE)
    hva = await guest.process.mmap(pages * PAGE_SIZE, kind="file_shared", file=memfd)
    await guest.vm.set_user_memory_region(FILE_SLOT, FILE_GPA, pages * PAGE_SIZE, hva)
    file = RamSlot(FILE_SLOT, FILE_GPA, pages * PAGE_SIZE, hva)
    return _Memory(stage, anon, file, memfd, pages)


async def _cost(memory: _Memory, action: Callable[[], Awaitable[int]]) -> dict[str, int]:
    """Of one action, and of the next copies, which meet what it left."""
    async with memory.stage.counted() as cost:
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
    designs=(SHARED.name,),
)
