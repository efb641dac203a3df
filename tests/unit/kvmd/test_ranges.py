"""A change of a range by compiled code against the loop over runs: each entry, and all that follows."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from random import Random

import pytest

from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.compiled import WORTH_TABLES, Compiled
from kvmd.core.tables.ranges import (
    CLEAR_ACCESSED,
    CLEAR_DIRTY,
    TRACK_ACCESS,
    UNLIMITED,
    WRITE_PROTECT,
    ZAP,
    edit_leaves,
)
from kvmd.core.tables.tdp_table import Role, TdpMmu
from protocol.pt.bits import FROZEN
from protocol.pt.ept import EPT_AD
from protocol.pt.kernels import Kernels
from protocol.pt.leaf_edit import LeafEdit, RangeChange, RangeKernels, SomePages
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.trace import TRACE
from protocol.units import Gfn, GfnSpan, Hpa, Level, Pfn

BASE = 0x10_0000
PAGES = 24
RULES = ept_rules(46, Level(3))
EDITS = {
    "zap": ZAP,
    "write-protect": WRITE_PROTECT,
    "clear D": CLEAR_DIRTY,
    "clear A": CLEAR_ACCESSED,
    "track": TRACK_ACCESS,
}


class Counted:
    """Compiled code that knows how often it was asked."""

    def __init__(self, inner: RangeKernels) -> None:
        self.asked = 0
        self._inner = inner

    def edit_leaves(self, *what: object) -> RangeChange:
        self.asked += 1
        return self._inner.edit_leaves(*what)  # type: ignore[arg-type]


class Various:
    """What `seed` makes: small leaves and huge ones, absent ones, frozen ones, gfns without a slot."""

    def __init__(self, seed: int, *, compiled: bool) -> None:
        self.memory = bytearray(PAGES * 4096)
        writer = TableWriter(Hpa(BASE), memoryview(self.memory))
        self.compiled = Compiled(writer)
        self.pool = TablePool(writer, len(self.memory))
        self.mmu = TdpMmu(1, writer, self.pool, RULES, lambda: 1)
        self.mmu.compiled = self.compiled
        random = Random(seed)
        self.root = self.mmu.get_root(Role(Level(4), 0, ad_enabled=random.random() < 0.5))
        for region in random.sample(range(8), 6):
            self._fill(random, region << 9)
        self.root.stale = False
        if compiled:
            self.kernels = Counted(Kernels(writer))
            self.compiled.kernels = self.kernels

    def _fill(self, random: Random, first: int) -> None:
        mmu, root = self.mmu, self.root
        kind = random.random()
        if kind < 0.25:
            tdp_mmu.map_page(mmu, root, Gfn(first), Pfn(first), Level(2), writable=random.random() < 0.7)
            return
        if kind < 0.4:
            level, at, entry = mmu.seek(root, Gfn(first), Level(2))
            if level == 2:
                mmu.change(root, Gfn(first), level, at, entry, FROZEN)
            return
        for gfn in random.sample(range(first, first + 512), random.choice((1, 40, 512))):
            if random.random() < 0.1:
                tdp_mmu.map_mmio(mmu, root, Gfn(gfn), 7)
            else:
                writable, young = random.random() < 0.7, random.random() < 0.7
                where = mmu, root, Gfn(gfn), Pfn(gfn), Level(1)
                tdp_mmu.map_page(*where, writable=writable, accessed=young)

    @property
    def all_of_it(self) -> tuple[object, ...]:
        root = self.root
        states = bytes(root.record.state(Gfn(gfn)) for gfn in range(9 << 9))
        return bytes(self.memory), root.leaves, root.tables_at, root.stale, states


@dataclass(frozen=True)
class Change:
    """Of a range, in as many pieces as `limit` makes of it."""

    start: int
    end: int
    edit: LeafEdit
    huge: LeafEdit | None
    wanted: SomePages | None
    limit: int

    @classmethod
    def drawn(cls, random: Random, edit: LeafEdit) -> Change:
        start = random.choice((0, random.randrange(8 << 9)))
        end = random.choice((8 << 9, start + 1 + random.randrange(2000)))
        wanted = None
        if random.random() < 0.5:
            bits = random.choice(
                (random.randbytes((end - start) // 8 + 1), b"\xff" * ((end - start) // 8 + 1))
            )
            wanted = SomePages(Gfn(start), bits)
        limit = random.choice((UNLIMITED, 1, 100, 513))
        return cls(start, end, edit, random.choice((None, WRITE_PROTECT)), wanted, limit)

    def make(self, table: Various) -> list[tuple[int, int]]:
        """How many leaves each piece changed, and where the next begins."""
        cursor = table.mmu.cursor(table.root, GfnSpan(Gfn(self.start), Gfn(self.end)))
        pieces: list[tuple[int, int]] = []
        while not pieces or pieces[-1][0] == self.limit:
            what = table.mmu, table.root, cursor, self.edit, self.huge, self.wanted, self.limit
            pieces.append((edit_leaves(*what), cursor.frame))
            cursor.resume()
        return pieces


def differ(seed: int, edit: LeafEdit, kernels: type[Kernels] = Kernels) -> bool:
    """Whether compiled code and the loop over runs do, in three changes of one table."""
    by_runs, at_once = Various(seed, compiled=False), Various(seed, compiled=True)
    at_once.compiled.kernels = kernels(at_once.mmu.writer)
    assert by_runs.all_of_it == at_once.all_of_it
    random = Random(seed)
    for change in [Change.drawn(random, edit) for _ in range(3)]:
        counted = [[count for count, _ in change.make(table)] for table in (by_runs, at_once)]
        if counted[0] != counted[1] or by_runs.all_of_it != at_once.all_of_it:
            return True
    return False


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_both_make_one_table_and_one_record_of_it(edit: LeafEdit) -> None:
    for seed in range(25):
        assert not differ(seed, edit), f"seed {seed}"


class Careless(Kernels):
    """Planted: whatever is wanted."""

    def edit_leaves(self, *what: object) -> RangeChange:
        *before, _, limit = what
        return super().edit_leaves(*before, None, limit)  # type: ignore[arg-type, call-arg]


class Forgetful(Kernels):
    """Planted: the frame behind the one that was changed last is passed by."""

    def edit_leaves(self, *what: object) -> RangeChange:
        reached, *rest = super().edit_leaves(*what)  # type: ignore[arg-type]
        return RangeChange(reached + 1, *rest)


class SaysNothing(Kernels):
    """Planted: nothing says which bits leaves lost."""

    def edit_leaves(self, *what: object) -> RangeChange:
        return super().edit_leaves(*what)._replace(lost=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", [Careless, Forgetful, SaysNothing])
def test_compiled_code_that_does_something_else_is_noticed(kernels: type[Kernels]) -> None:
    assert any(differ(seed, WRITE_PROTECT, kernels) for seed in range(60))


def test_where_nothing_is_in_the_way_a_range_is_one_call() -> None:
    table = Various(0, compiled=True)
    tdp_mmu.zap_leafs(table.mmu, table.root.everything)
    table.kernels.asked = 0
    for gfn in range(1 << 9, 3 << 9):
        tdp_mmu.map_page(table.mmu, table.root, Gfn(gfn), Pfn(gfn), Level(1), writable=True)
    span = GfnSpan(Gfn(1 << 9), Gfn(3 << 9))
    cursor = table.mmu.cursor(table.root, span)
    assert edit_leaves(table.mmu, table.root, cursor, ZAP) == 1 << 10
    assert table.kernels.asked == 1


class OnePinned:
    """The port `PinnedEntries`: one gfn."""

    def __init__(self, gfn: int) -> None:
        self.gfn = Gfn(gfn)

    def __len__(self) -> int:
        return 1

    def holds(self, as_id: int, gfn: Gfn) -> bool:
        return gfn == self.gfn

    def any_in(self, as_id: int, span: GfnSpan) -> bool:
        return span.start <= self.gfn < span.end

    def within(self, as_id: int, span: GfnSpan) -> list[Gfn]:
        return [self.gfn] if self.any_in(as_id, span) else []


def test_a_pinned_gfn_keeps_its_entry_and_a_trace_names_each_change() -> None:
    table = Various(0, compiled=True)
    tdp_mmu.zap_leafs(table.mmu, table.root.everything)
    for gfn in range(512):
        tdp_mmu.map_page(table.mmu, table.root, Gfn(gfn), Pfn(gfn), Level(1), writable=True)
    table.mmu.pinned = OnePinned(7)
    table.kernels.asked = 0
    cursor = table.mmu.cursor(table.root, GfnSpan(Gfn(0), Gfn(256)))
    assert edit_leaves(table.mmu, table.root, cursor, ZAP) == 255
    told: list[str] = []
    TRACE.start(told.append)
    try:
        cursor = table.mmu.cursor(table.root, GfnSpan(Gfn(256), Gfn(512)))
        assert edit_leaves(table.mmu, table.root, cursor, ZAP) == 256
    finally:
        TRACE.stop()
    assert len(told) == 256
    assert table.root.leaves == [0, 1, 0, 0]
    assert table.kernels.asked == 0


def test_a_table_that_lies_nowhere_is_left_to_who_says_so() -> None:
    table = Various(0, compiled=True)
    words = memoryview(table.memory).cast("Q")
    words[0] = table.root.format.make_table(Hpa(BASE + PAGES * 4096), Level(4))
    where = table.root.format, table.root.hpa, Level(4), 5, 9
    assert table.kernels.edit_leaves(*where, ZAP, None, UNLIMITED) == RangeChange(5, 0, 0, 0)


def test_pages_that_are_wanted_are_those_of_their_bits() -> None:
    for seed in range(50):
        random = Random(seed)
        frames = set(random.sample(range(1000, 1400), random.randrange(1, 400)))
        some = SomePages.of(frames)
        assert {frame for frame in range(900, 1500) if frame in some} == frames
        start, end = sorted(random.sample(range(1000, 1400), 2))
        assert set(some.within(start, end)) == {frame for frame in frames if start <= frame < end}
        assert not some.all_in(start, end) or set(range(start, end)) <= frames


def test_a_table_that_grows_asks_once() -> None:
    asked: list[object] = []
    memory = bytearray((WORTH_TABLES + 8) * 4096)
    writer = TableWriter(Hpa(BASE), memoryview(memory))
    compiled = Compiled(writer, lambda *what: asked.append(what))
    mmu = TdpMmu(1, writer, TablePool(writer, len(memory)), RULES, lambda: 1)
    mmu.compiled = compiled
    root = mmu.get_root(Role(Level(4), 0, True))
    for number in range(WORTH_TABLES + 2):
        assert bool(asked) == (number >= WORTH_TABLES)
        tdp_mmu.map_page(mmu, root, Gfn(number << 9), Pfn(number), Level(1), writable=True)
    assert len(asked) == 1


READER = """
import mmap, sys
view = memoryview(mmap.mmap(int(sys.argv[1]), 4096, prot=mmap.PROT_READ)).cast("Q")
print("ready", flush=True)
seen, looks = set(), 0
while looks < 400000 or (len(seen) < 2 and looks < 50000000):
    seen.add(view[300])
    looks += 1
print(sorted(seen))
"""


def test_a_reader_in_another_process_sees_the_old_entries_or_the_new_ones() -> None:
    """One root of level 1, zapped at once while another process reads: a store in two halves would show a
    third value."""
    old = 0x0E00_3FFF_FFFF_F377
    fd = os.memfd_create("tables", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as mapped:
            writer = TableWriter(Hpa(BASE), memoryview(mapped))
            words, kernels = writer.words, Kernels(writer)
            child = [sys.executable, "-c", READER, str(fd)]
            with subprocess.Popen(child, pass_fds=[fd], stdout=subprocess.PIPE, text=True) as reader:
                assert reader.stdout is not None
                reader.stdout.readline()
                while reader.poll() is None:
                    for index in range(290, 310):
                        words[index] = old
                    kernels.edit_leaves(EPT_AD, Hpa(BASE), Level(1), 280, 320, ZAP, None, UNLIMITED)
                seen = reader.stdout.read()
            del kernels
            writer.release()
    finally:
        os.close(fd)
    assert {int(value) for value in seen.strip("[]\n").split(",")} == {old, 0}
