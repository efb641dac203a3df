"""Ours: a device function whose DMA goes through the walker, over memfds, in this process.

Source and target lie apart in the guest; behind them are frames of one window, and real tables in another,
read by the unit as they are in the daemons.  Everything is translated once before it is timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns

from bench.harness import SEED
from bench.memory import shared_buffer
from device_sim.core.dmar import RemappingUnit
from device_sim.core.function import DmaRange, Function
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from device_sim.core.unit_registers import Events, RegisterPages
from iommufdd.core.domain import Domain
from iommufdd.core.translation_tables import TranslationTables
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START, Window, WindowKind
from protocol.hw.pasid_entry import RID_PASID, PasidEntry
from protocol.hw.vtd_regs import Gcmd, Reg
from protocol.pt.ept import EPT_AD
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, index_of
from protocol.pt.mem import TableWriter
from protocol.units import (
    GIB,
    LEVEL_2M,
    LEVEL_4K,
    MIB,
    PAGE_SIZE,
    Gfn,
    Hpa,
    Iova,
    Level,
    gfn_of,
    gpa_of_iova,
    pages_of_level,
    pfn_of,
)

RID = 8
STRUCTURES = Hpa(LOW_RAM_START + GIB)
SOURCE, TARGET = Iova(64 * MIB), Iova(66 * MIB)
ROOT_LEVELS = Level(4)


class Engine:
    """`frames` gives, for page 0, 1, ... of a side, the page of its 2 MiB of frames that backs it."""

    def __init__(self, level: Level, frames: Callable[[int], int]) -> None:
        memory = PhysicalMemory()
        frames_view = shared_buffer(4 * MIB)
        tables_view = shared_buffer(MIB)
        tables_view[:] = bytes(MIB)
        writer = TableWriter(LOW_RAM_START, tables_view)
        for side, iova in enumerate((SOURCE, TARGET)):
            for page in range(0, ENTRIES, pages_of_level(level)):
                hpa = Hpa(HIGH_RAM_START + side * 2 * MIB + frames(page) * PAGE_SIZE)
                _map(writer, Gfn(gfn_of(gpa_of_iova(iova)) + page), hpa, level)
        memory.add(Window(WindowKind.TABLES, LOW_RAM_START, MIB, tables_view), _keep)
        memory.add(Window(WindowKind.FRAMES, HIGH_RAM_START, 4 * MIB, frames_view), _keep)
        cap, ecap = capabilities(levels=ROOT_LEVELS, max_page="1G")
        unit = RemappingUnit(cap, ecap, 46, memory)
        domain = Domain(LOW_RAM_START, ROOT_LEVELS, 1, level)
        _attach(unit, memory, domain.pasid_entry(ecap))
        self.function = Function(RID, unit, memory, perf_counter_ns)
        self.function.ats_enabled = self.function.dma_enabled = True

    def copier(self, size: int) -> Callable[[], object]:
        """What copies `size` bytes from source to target."""
        self._translate(size)
        function = self.function
        assert function.copy(SOURCE, TARGET, size) == size, "part of it is not translated"
        return lambda: function.copy(SOURCE, TARGET, size)

    def reader(self, size: int) -> Callable[[], object]:
        """What reads `size` bytes of the source."""
        self._translate(size)
        function = self.function
        assert function.read(SOURCE, size) is not None, "part of it is not translated"
        return lambda: function.read(SOURCE, size)

    def _translate(self, size: int) -> None:
        while self.function.copy(SOURCE, TARGET, size) < size:
            done = self.function.copy(SOURCE, TARGET, size)
            rest = size - done
            ranges = [DmaRange(Iova(SOURCE + done), rest, False), DmaRange(Iova(TARGET + done), rest, True)]
            with suppress(StopIteration):
                self.function.make_accessible(ranges, block=False).send(None)


def contiguous(page: int) -> int:
    return page


def scattered() -> Callable[[int], int]:
    """No page is next to the one before."""
    order = list(range(ENTRIES))
    random.Random(SEED).shuffle(order)
    return order.__getitem__


def copy_2m() -> Callable[[], object]:
    return Engine(LEVEL_2M, contiguous).copier(2 * MIB)


def copy_4k(size: int) -> Callable[[], object]:
    return Engine(LEVEL_4K, contiguous).copier(size)


def copy_scattered(size: int) -> Callable[[], object]:
    return Engine(LEVEL_4K, scattered()).copier(size)


def read_4k(size: int) -> Callable[[], object]:
    return Engine(LEVEL_4K, contiguous).reader(size)


def _map(writer: TableWriter, gfn: Gfn, hpa: Hpa, goal: Level) -> None:
    for level in range(ROOT_LEVELS, goal, -1):
        at = _table(level, gfn) + index_of(gfn, Level(level)) * ENTRY_BYTES
        writer.store64(at, EPT_AD.make_table(_table(level - 1, gfn), Level(level)))
    leaf = EPT_AD.make_leaf(pfn_of(hpa), goal, writable=True)
    writer.store64(_table(goal, gfn) + index_of(gfn, goal) * ENTRY_BYTES, leaf)


def _table(level: int, gfn: Gfn) -> Hpa:
    """The root first; leaf tables, one for each 2 MiB, last."""
    page = ROOT_LEVELS - level if level > LEVEL_4K else ROOT_LEVELS - 1 + index_of(gfn, LEVEL_2M)
    return Hpa(LOW_RAM_START + page * PAGE_SIZE)


def _attach(unit: RemappingUnit, memory: PhysicalMemory, entry: PasidEntry) -> None:
    """What the driver stores: tables that lead to the entry, and the command to use them."""
    view = shared_buffer(MIB)
    view[:] = bytes(MIB)
    memory.add(Window(WindowKind.TABLES, STRUCTURES, MIB, view), _keep)
    pages = iter(range(STRUCTURES, STRUCTURES + MIB, PAGE_SIZE))
    tables = TranslationTables(TableWriter(STRUCTURES, view), lambda: Hpa(next(pages)))
    tables.add_function(RID, ats=True, pasid=True, pri=True)
    tables.put_pasid_entry(RID, RID_PASID, entry)
    private = RegisterPages.private()
    unit.connect(private, Events())
    private.stored.store(Reg.RTADDR, tables.rtaddr)
    private.stored.store(Reg.GCMD, Gcmd.SRTP | Gcmd.TE)
    unit.kick()


def _keep() -> None: ...
