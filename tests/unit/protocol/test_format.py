"""One suite for every table format, made-up ones too: making, reading, splitting, what is reserved, walks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pt import entry as entry_words
from protocol.pt.cursor import Cursor, seek
from protocol.pt.ept import EPT_AD
from protocol.pt.format import NEVER, Match, Right, TableFormat
from protocol.pt.mem import TableWriter
from protocol.pt.walk import Outcome, WalkRules, walk
from protocol.units import Hpa, Level, Pfn
from tests.unit.protocol.formats import AMD_V2, KINDS, NEXT_LEVEL, FoundLeaf, Kind

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
BASE = 0x10_0000
PAGES = 40
EIGHT = list(itertools.product((False, True), repeat=3))


def leaf_levels(fmt: TableFormat) -> list[Level]:
    return [Level(n) for n in range(1, 6) if fmt.leaf[n] != NEVER]


def table_levels(fmt: TableFormat) -> list[Level]:
    return [Level(n) for n in range(1, 6) if fmt.table[n] != NEVER]


# -- entries -------------------------------------------------------------------------------------------


@every_kind
def test_entries_are_those_worked_by_hand(kind: Kind) -> None:
    fmt = kind.fmt
    assert fmt.make_table(Hpa(0x123_4000), Level(2)) == kind.table
    assert fmt.make_leaf(Pfn(0x1_2345), Level(1), writable=True) == kind.leaf
    huge = fmt.make_leaf(Pfn(0x1_2400), Level(2), writable=False, executable=False)
    assert huge == kind.huge


def round_trip(fmt: TableFormat) -> None:
    """A leaf is read as it was made, at each level and with each set of rights."""
    for level, (writable, executable, accessed) in itertools.product(leaf_levels(fmt), EIGHT):
        pfn = Pfn(0x345 << 9 * (level - 1))
        entry = fmt.make_leaf(pfn, level, writable=writable, executable=executable, accessed=accessed)
        assert fmt.is_leaf(entry, level), "a leaf is a leaf"
        assert not fmt.is_table(entry, level), "a leaf is no table"
        assert fmt.pfn_of(entry) == pfn, "a leaf maps its frame"
        assert fmt.read(entry), "a leaf is readable"
        assert fmt.write(entry) == writable, "a leaf is writable as made"
        if fmt.execute.mask:
            assert fmt.execute(entry) == executable, "a leaf is executable as made"
        assert entry & fmt.accessed == (fmt.accessed if accessed else 0)
        fmt.check(entry, level)
    for level in table_levels(fmt):
        entry = fmt.make_table(Hpa(0x123_4000), level)
        assert fmt.is_table(entry, level), "a table entry is one"
        assert not fmt.is_leaf(entry, level), "a table entry is no leaf"
        assert fmt.table_of(entry) == 0x123_4000
        fmt.check(entry, level)


@every_kind
def test_what_is_made_is_read_back(kind: Kind) -> None:
    round_trip(kind.fmt)


@every_kind
def test_an_empty_entry_is_absent_at_every_level(kind: Kind) -> None:
    assert not any(kind.fmt.is_present(0, Level(level)) for level in range(1, 6))


@every_kind
def test_a_leaf_that_does_not_fit_its_frame_is_a_bug(kind: Kind) -> None:
    with pytest.raises(AssertionError, match="not aligned"):
        kind.fmt.make_leaf(Pfn(0x1_2345), Level(2), writable=True)


def split_keeps(fmt: TableFormat) -> None:
    """Every small page of a huge leaf is the frame it was, with the rights it had."""
    for level, (writable, executable, _) in itertools.product(leaf_levels(fmt)[1:], EIGHT):
        first = 0x4_0000 << 9 * (level - 2)
        leaf = fmt.make_leaf(Pfn(first), level, writable=writable, executable=executable)
        children, below = fmt.split(leaf, level), Level(level - 1)
        assert len(children) == 512
        for index, child in enumerate(children):
            assert fmt.is_leaf(child, below), f"child {index} of level {level} is no leaf"
            assert fmt.pfn_of(child) == first + (index << 9 * (below - 1)), "a split changes frames"
            rights = [right(child) for right in (fmt.read, fmt.write, fmt.execute)]
            assert rights == [right(leaf) for right in (fmt.read, fmt.write, fmt.execute)], "and rights"
            fmt.check(child, below)


@every_kind
def test_a_split_keeps_every_translation_and_right(kind: Kind) -> None:
    split_keeps(kind.fmt)


@every_kind
def test_each_reserved_bit_is_refused(kind: Kind) -> None:
    fmt, refused = kind.fmt, 0
    for level in range(1, 6):
        for make, reserved in ((True, fmt.reserved_leaf), (False, fmt.reserved_table)):
            if (fmt.leaf if make else fmt.table)[level] == NEVER:
                continue
            plain = fmt.leaf[level].value | fmt.leaf_bits if make else fmt.table_bits[level]
            for bit in (1 << n for n in range(64) if reserved[level] >> n & 1):
                if (fmt.is_leaf(plain | bit, Level(level)), make) == (False, True):
                    continue  # it would be a table then, of a size the format lacks
                refused += 1
                with pytest.raises(AssertionError, match=r"reserved bits|neither"):
                    fmt.check(plain | bit, Level(level))
    assert refused > 20


@every_kind
def test_bits_that_a_walker_calls_illegal_are_refused(kind: Kind) -> None:
    for low in kind.fmt.illegal:
        spoilt = kind.leaf & ~63 | low
        with pytest.raises(AssertionError, match=r"illegal|neither"):
            kind.fmt.check(spoilt, Level(1))


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 5))
def test_kvmd_s_words_and_the_format_say_the_same_of_any_entry(entry: int, number: int) -> None:
    level = Level(number)
    assert EPT_AD.is_table(entry, level) == entry_words.is_table(entry, level)
    assert EPT_AD.is_leaf(entry, level) == entry_words.is_present_leaf(entry, level)
    assert EPT_AD.table_of(entry) == entry_words.table_of(entry)


# -- walks ---------------------------------------------------------------------------------------------


class Table:
    """A table of the format with leaves of all sizes in it, made by the format, seek and the writer alone."""

    def __init__(self, kind: Kind, random: Random) -> None:
        self.kind, self.fmt = kind, kind.fmt
        self.memory = bytearray(PAGES * 4096)
        self.writer = TableWriter(Hpa(BASE), memoryview(self.memory))
        self.pages = iter(range(BASE + 4096, BASE + PAGES * 4096, 4096))
        self.said: dict[int, FoundLeaf] = {}  # by the first page of the leaf
        for _ in range(60):
            self.put(random)

    def put(self, random: Random) -> None:
        level = random.choice(leaf_levels(self.fmt))
        page = random.randrange(1 << 20) if level < 3 else random.randrange(1 << 9 * self.kind.levels)
        page = page >> 9 * (level - 1) << 9 * (level - 1)
        while True:
            met = seek(self.writer, self.fmt, Hpa(BASE), self.kind.levels, page, level)
            if met.level == level or self.fmt.is_leaf(met.entry, met.level):
                break
            made = next(self.pages, None)
            if made is None:
                return
            self.writer.store64(met.at, self.fmt.make_table(Hpa(made), met.level))
        if self.fmt.is_present(met.entry, met.level):
            return
        pfn, write, execute = 0x40_0000 + page % (1 << 20), random.random() < 0.5, random.random() < 0.5
        execute |= not self.fmt.execute.mask
        self.said[page] = FoundLeaf(pfn, level, write, execute)
        entry = self.fmt.make_leaf(Pfn(pfn), level, writable=write, executable=execute)
        self.writer.store64(met.at, entry)

    def entry(self, table: int, index: int) -> int:
        at = table - BASE + 8 * index
        return int.from_bytes(self.memory[at : at + 8], "little")

    def at(self, page: int) -> FoundLeaf | None:
        """What was said of a page."""
        for level in (1, 2, 3):
            first = page >> 9 * (level - 1) << 9 * (level - 1)
            found = self.said.get(first)
            if found is not None and found.level >= level:
                return found._replace(pfn=found.pfn + page - first)
        return None

    def some_pages(self, random: Random) -> list[int]:
        inside = [page + random.randrange(1 << 9 * (met.level - 1)) for page, met in self.said.items()]
        beside = [page + step for page in inside for step in (-1, 1)]
        return [page for page in inside + beside if 0 <= page < 1 << 9 * self.kind.levels]


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_a_plain_walk_the_format_s_and_the_product_s_find_what_was_put(kind: Kind, seed: int) -> None:
    random = Random(seed)
    table, fmt = Table(kind, random), kind.fmt
    assert len(table.said) > 20
    for page in table.some_pages(random):
        said = table.at(page)
        assert kind.walk(table.entry, BASE, kind.levels, page) == said
        met = seek(table.writer, fmt, Hpa(BASE), kind.levels, page)
        assert fmt.is_leaf(met.entry, met.level) == (said is not None)
        if said is not None:
            frame = fmt.pfn_of(met.entry) + page % (1 << 9 * (met.level - 1))
            assert (frame, met.level, fmt.write(met.entry)) == said[:3]
        for rules in kind.rules:
            assert walked(table, rules, page) == (said and said[:3]), rules.name


def walked(table: Table, rules: WalkRules, page: int) -> tuple[int, int, bool] | None:
    found = walk(table.writer, rules, Hpa(BASE), table.kind.levels, page << 12)
    assert found.outcome is not Outcome.RESERVED
    if found.outcome is Outcome.ABSENT:
        return None
    return found.hpa(page << 12) >> 12, found.level, found.rights & 2 != 0


@every_kind
def test_a_cursor_meets_the_leaves_that_were_put_in_order(kind: Kind) -> None:
    table = Table(kind, Random(7))
    limit = 1 << 9 * kind.levels
    found = [
        (run.frame + (index << 9 * (run.level - 1)), run.level)
        for run in Cursor(table.writer, kind.fmt, Hpa(BASE), kind.levels, 0, limit)
        for index, entry in enumerate(run.entries)
        if kind.fmt.is_leaf(entry, run.level)
    ]
    assert found == [(page, met.level) for page, met in sorted(table.said.items())]


# -- formats that are wrong ----------------------------------------------------------------------------


WRONG = [
    (replace(EPT_AD, table_bits=(0, 0, *[EPT_AD.table_bits[2] | 0x80] * 4)), "a table entry is one"),
    (replace(EPT_AD, leaf_bits=EPT_AD.leaf_bits | 0x1000), "a leaf maps its frame"),
    (replace(EPT_AD, write=Right(0, 0, 2)), "a leaf is writable as made"),
    (replace(AMD_V2, execute=Right(1 | 1 << 63, 1, 1 << 63, 0)), "a leaf is executable as made"),
    (replace(NEXT_LEVEL, address=0xF000), "a leaf maps its frame"),
    (replace(EPT_AD, reserved_leaf=(0x40,) * 6), "reserved bits"),
]


@pytest.mark.parametrize(("fmt", "seen"), WRONG, ids=[seen for _, seen in WRONG])
def test_a_format_that_reads_otherwise_than_it_makes_is_found(fmt: TableFormat, seen: str) -> None:
    with pytest.raises(AssertionError, match=seen):
        round_trip(fmt)


def _spoilt(split: Callable[..., list[int]], bit: int, *leaf: Any) -> list[int]:
    return [child ^ bit for child in split(*leaf)]


@every_kind
def test_a_split_that_changes_a_bit_of_the_children_is_found(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, fmt = TableFormat.split, kind.fmt
    bits = {
        0x1000: "a split changes frames",
        fmt.write.mask & ~fmt.read.mask: "and rights",
        fmt.leaf[1].mask: "is no leaf",
    }
    for bit, seen in bits.items():
        spoilt = partial(_spoilt, split, bit)
        monkeypatch.setattr(TableFormat, "split", lambda fmt, *leaf, spoilt=spoilt: spoilt(fmt, *leaf))
        with pytest.raises(AssertionError, match=seen):
            split_keeps(fmt)


def test_an_entry_of_level_1_that_could_be_a_table_is_no_format() -> None:
    with pytest.raises(AssertionError, match="level 1"):
        replace(EPT_AD, table=(NEVER, Match(1, 1), *EPT_AD.table[2:]))
