"""Both walks against the rows of the format tables, and against a walker written from them.

Tables are raw bytes; entries are written out in hex.  The last property is the one everything leans on:
the fast walk, the close walk and the oracle agree on any memory whatever.
"""

from __future__ import annotations

import itertools
import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pt import walk as walk_module
from protocol.pt.cursor import walk_range
from protocol.pt.ept import EPT_AD
from protocol.pt.mem import TableOutside, TableReader
from protocol.pt.walk import Outcome, Walk, WalkRules, ept_rules, second_stage_rules, walk
from protocol.units import Gfn, GfnSpan, Hpa, Level
from tests.oracle.table import Found, Machine, Outside, RawTables, ept_walk, second_stage_walk

BASE = 0x10_0000
PAGES = 6
# Index 1 at level 5, 2 at 4, 3 at 3, 4 at 2, 5 at 1: every level's entry lies at another offset.
ADDRESS = 1 << 48 | 2 << 39 | 3 << 30 | 4 << 21 | 5 << 12 | 0x678
INDEX = {5: 1, 4: 2, 3: 3, 2: 4, 1: 5}
LEAF = 0x0E00_0001_2345_6377
LEAF_HPA = 0x1_2345_6678
HUGE = {2: 0x0E00_0001_2340_03F7, 3: 0x0E00_0001_4000_03F7}
HUGE_HPA = {2: 0x1_2340_5678, 3: 0x1_4080_5678}
TABLE_BITS = 0x0800_0000_0000_0107

EPT = ept_rules(46, Level(3))
UNIT = second_stage_rules(46, Level(3), snoop_control=False)
UNIT_SC = second_stage_rules(46, Level(3), snoop_control=True)
ALL_RULES = (EPT, UNIT, UNIT_SC)


class Chain:
    """A path from the root in page 0 to the leaf; `put` replaces the entry of one level."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.memory = bytearray(PAGES * 4096)
        for level in range(levels, 0, -1):
            self.put(level, LEAF if level == 1 else self.table(level - 1) | TABLE_BITS)

    def table(self, level: int) -> int:
        return BASE + (self.levels - level) * 4096

    def put(self, level: int, entry: int) -> None:
        struct.pack_into("<Q", self.memory, self.table(level) - BASE + 8 * INDEX[level], entry)

    def get(self, level: int) -> int:
        value: int = struct.unpack_from("<Q", self.memory, self.table(level) - BASE + 8 * INDEX[level])[0]
        return value

    def walk(self, rules: WalkRules, address: int | None = None) -> Walk:
        tables = TableReader(Hpa(BASE), memoryview(self.memory))
        at = ADDRESS & (1 << 12 + 9 * self.levels) - 1 if address is None else address
        return walk(tables, rules, Hpa(BASE), Level(self.levels), at)


@pytest.mark.parametrize("rules", ALL_RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("levels", [4, 5])
def test_a_plain_path_translates(levels: int, rules: WalkRules) -> None:
    chain = Chain(levels)
    found = chain.walk(rules)
    assert found == (Outcome.MAPPED, 1, LEAF, 7, 7, chain.table(1))
    assert found.hpa(ADDRESS) == LEAF_HPA


@pytest.mark.parametrize("rules", ALL_RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_huge_leaf_translates_with_its_larger_offset(levels: int, level: int, rules: WalkRules) -> None:
    chain = Chain(levels)
    chain.put(level, HUGE[level])
    found = chain.walk(rules)
    assert found == (Outcome.MAPPED, level, HUGE[level], 7, 7, chain.table(level))
    assert found.hpa(ADDRESS) == HUGE_HPA[level]


def test_no_address_comes_of_a_walk_that_found_none() -> None:
    chain = Chain(4)
    chain.put(1, 0)
    with pytest.raises(AssertionError, match="ABSENT"):
        chain.walk(EPT).hpa(ADDRESS)


# What the CPU makes of bits 2:0 of one entry, X W R: M maps, A absent, R misconfiguration.
EPT_XWR = {0b000: "A", 0b001: "M", 0b010: "R", 0b011: "M", 0b100: "M", 0b101: "M", 0b110: "R", 0b111: "M"}
# The unit asks for R or W and ignores X; write-only is legal.
UNIT_XWR = {0b000: "A", 0b001: "M", 0b010: "M", 0b011: "M", 0b100: "A", 0b101: "M", 0b110: "M", 0b111: "M"}
LETTER = {"A": Outcome.ABSENT, "M": Outcome.MAPPED, "R": Outcome.RESERVED}


@pytest.mark.parametrize("level", [5, 4, 3, 2, 1])
@pytest.mark.parametrize("xwr", range(8))
def test_each_xwr_combination_means_what_the_manuals_say(xwr: int, level: int) -> None:
    chain = Chain(5)
    chain.put(level, chain.get(level) & ~7 | xwr)
    for rules, meaning in ((EPT, EPT_XWR), (UNIT, UNIT_XWR), (UNIT_SC, UNIT_XWR)):
        found = chain.walk(rules)
        assert found.outcome is LETTER[meaning[xwr]], rules.name
        if found.outcome is Outcome.MAPPED:
            assert found.level == 1
            read, write, fetch = found.rights & 1, found.rights >> 1 & 1, found.rights >> 2 & 1
            assert (read, write, fetch) == (xwr & 1, xwr >> 1 & 1, xwr >> 2 & 1)
            assert found.rights_above == (7 if level == 1 else xwr)
        else:
            assert (found.level, found.entry, found.rights) == (level, chain.get(level), 0)


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("xwr", range(8))
def test_each_xwr_combination_of_a_huge_leaf_means_the_same(xwr: int, level: int) -> None:
    chain = Chain(4)
    chain.put(level, HUGE[level] & ~7 | xwr)
    assert chain.walk(EPT).outcome is LETTER[EPT_XWR[xwr]]
    assert chain.walk(UNIT).outcome is LETTER[UNIT_XWR[xwr]]


def test_execute_only_is_a_misconfiguration_without_the_capability() -> None:
    chain = Chain(4)
    chain.put(1, LEAF & ~3)
    assert chain.walk(EPT).outcome is Outcome.MAPPED
    assert chain.walk(ept_rules(46, Level(3), execute_only=False)).outcome is Outcome.RESERVED


@pytest.mark.parametrize(("above", "below"), list(itertools.product((0b001, 0b011, 0b101, 0b111), repeat=2)))
def test_rights_are_the_and_of_the_path(above: int, below: int) -> None:
    for level in (4, 3, 2):
        chain = Chain(4)
        chain.put(level, chain.get(level) & ~7 | above)
        chain.put(1, LEAF & ~7 | below)
        for rules in ALL_RULES:
            found = chain.walk(rules)
            assert (found.outcome, found.rights, found.rights_above) == (
                Outcome.MAPPED,
                above & below,
                above,
            )


# Reserved bits of a present entry, by what it is; everything else in 63:3 a walker must not mind.
EPT_RESERVED = {
    "level 5": {3, 4, 5, 6, 7} | set(range(46, 52)),
    "level 4": {3, 4, 5, 6, 7} | set(range(46, 52)),
    "level 3": {3, 4, 5, 6} | set(range(46, 52)),
    "level 2": {3, 4, 5, 6} | set(range(46, 52)),
    "1G leaf": set(range(12, 30)) | set(range(46, 52)),
    "2M leaf": set(range(12, 21)) | set(range(46, 52)),
    "4K leaf": set(range(46, 52)),
}
UNIT_RESERVED = {
    "level 5": {7, 11, 62} | set(range(46, 52)),
    "level 4": {7, 11, 62} | set(range(46, 52)),
    "level 3": {11, 62} | set(range(46, 52)),
    "level 2": {11, 62} | set(range(46, 52)),
    "1G leaf": {11, 62} | set(range(12, 30)) | set(range(46, 52)),
    "2M leaf": {11, 62} | set(range(12, 21)) | set(range(46, 52)),
    "4K leaf": {11, 62} | set(range(46, 52)),
}
WHAT = {
    "level 5": (5, None),
    "level 4": (4, None),
    "level 3": (3, None),
    "level 2": (2, None),
    "1G leaf": (3, HUGE[3]),
    "2M leaf": (2, HUGE[2]),
    "4K leaf": (1, LEAF),
}


def reserved_bits(rules: WalkRules, what: str) -> set[int]:
    """Each bit from 6 up on its own that turns a sound entry into a reserved one."""
    level, leaf = WHAT[what]
    found = set()
    for n in range(6, 64):
        chain = Chain(5)
        if leaf is not None:
            chain.put(level, leaf)
        # Address bits that move a table pointer elsewhere are not this test's business.
        if leaf is None and 12 <= n < 46:
            continue
        # Bit 7 makes a leaf of a table entry of level 2 or 3: a row of its own.
        if leaf is None and n == 7 and level in (2, 3):
            continue
        chain.put(level, chain.get(level) | 1 << n)
        outcome = chain.walk(rules).outcome
        assert outcome in (Outcome.MAPPED, Outcome.RESERVED)
        if outcome is Outcome.RESERVED:
            assert chain.walk(rules).level == level
            found.add(n)
    return found


@pytest.mark.parametrize("what", WHAT)
def test_exactly_the_bits_of_the_table_are_reserved(what: str) -> None:
    assert reserved_bits(EPT, what) == {n for n in EPT_RESERVED[what] if n >= 6}
    assert reserved_bits(UNIT, what) == UNIT_RESERVED[what]
    snoop = {11} if "leaf" in what else set()
    assert reserved_bits(UNIT_SC, what) == UNIT_RESERVED[what] - snoop


@pytest.mark.parametrize("level", [5, 4, 3, 2])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_memory_type_bits_of_a_table_entry_are_reserved_for_the_cpu_only(n: int, level: int) -> None:
    chain = Chain(5)
    chain.put(level, chain.get(level) | 1 << n)
    assert chain.walk(EPT).outcome is Outcome.RESERVED
    assert chain.walk(UNIT).outcome is Outcome.MAPPED


@pytest.mark.parametrize("emt", range(8))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_memory_types_2_3_and_7_are_illegal_for_the_cpu_only(level: int, emt: int) -> None:
    chain = Chain(4)
    chain.put(level, {1: LEAF, **HUGE}[level] & ~0x38 | emt << 3)
    expected = Outcome.RESERVED if emt in (2, 3, 7) else Outcome.MAPPED
    assert chain.walk(EPT).outcome is expected
    assert chain.walk(UNIT).outcome is Outcome.MAPPED


@pytest.mark.parametrize(("largest", "legal"), [(1, []), (2, [2]), (3, [2, 3])])
def test_a_leaf_size_the_walker_lacks_is_reserved(largest: int, legal: list[int]) -> None:
    for level in (2, 3):
        chain = Chain(4)
        chain.put(level, HUGE[level])
        expected = Outcome.MAPPED if level in legal else Outcome.RESERVED
        assert chain.walk(ept_rules(46, Level(largest))).outcome is expected
        unit = second_stage_rules(46, Level(largest), snoop_control=True)
        assert chain.walk(unit).outcome is expected


@pytest.mark.rfc("RFC-27")
def test_the_old_place_of_the_present_marker_stops_the_unit_at_the_first_table() -> None:
    chain = Chain(4)
    for level in (4, 3, 2, 1):
        chain.put(level, chain.get(level) | 1 << 11)
    assert chain.walk(EPT).outcome is Outcome.MAPPED
    for rules in (UNIT, UNIT_SC):
        assert chain.walk(rules)[:2] == (Outcome.RESERVED, 4)


def test_an_mmio_entry_would_be_a_dma_mapping_and_a_frozen_one_is_nothing() -> None:
    chain = Chain(4)
    chain.put(1, 0x0000_0000_FEC0_0006)  # W and X without R: the value KVM caches MMIO with
    assert chain.walk(EPT).outcome is Outcome.RESERVED
    assert chain.walk(UNIT).outcome is Outcome.MAPPED
    assert chain.walk(UNIT).rights & 2
    for level in (1, 2, 3, 4):
        chain = Chain(4)
        chain.put(level, 0x5A0)
        assert {chain.walk(rules)[:2] for rules in ALL_RULES} == {(Outcome.ABSENT, level)}


@pytest.mark.parametrize("rules", ALL_RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("level", [4, 3, 2])
@pytest.mark.parametrize("pointer", [0, BASE - 4096, BASE + PAGES * 4096, 0x3FFF_FFFF_F000])
def test_a_pointer_out_of_table_memory_is_an_access_error(pointer: int, level: int, rules: WalkRules) -> None:
    chain = Chain(4)
    chain.put(level, pointer | TABLE_BITS)
    with pytest.raises(TableOutside):
        chain.walk(rules)


@pytest.mark.parametrize("root", [0, BASE - 4096, BASE - 8 * 4096, BASE + PAGES * 4096, 0x3FFF_FFFF_F000])
def test_a_root_out_of_table_memory_is_an_access_error(root: int) -> None:
    """Below the window too: nothing may wrap round to its end."""
    tables = TableReader(Hpa(BASE), memoryview(bytearray(b"\x07\x01\x10\0\0\0\0\x08" * 512 * PAGES)))
    for rules in ALL_RULES:
        for address in (0, ADDRESS & (1 << 48) - 1, (1 << 48) - 1):
            with pytest.raises(TableOutside):
                walk(tables, rules, Hpa(root), Level(4), address)


def test_absence_above_is_found_before_what_lies_below() -> None:
    chain = Chain(4)
    chain.put(3, 0)
    chain.put(1, 2)
    assert chain.walk(EPT)[:3] == (Outcome.ABSENT, 3, 0)


# -- the fast walk, the close walk and the oracle ------------------------------------------------------

LOW_12 = st.one_of(
    st.sampled_from([0x377, 0x107, 0x3F7, 0x175, 0x5A0, 0, 0x907, 0xB77, 0x006]), st.integers(0, 4095)
)
HIGH_12 = st.one_of(st.just(0), st.sampled_from([0x0E0, 0x080, 0x400, 0x800]), st.integers(0, 4095))
PAGE = st.one_of(
    st.integers(0x100, 0x100 + PAGES - 1),  # the window, so that walks go deep
    st.sampled_from([0, 0xFF, 0x100 + PAGES, 0x123456, 0x123400, 0x140000]),
    st.integers(0, (1 << 40) - 1),
)
ENTRY = st.builds(lambda low, page, high: low | page << 12 | high << 52, LOW_12, PAGE, HIGH_12)
MACHINE = st.builds(
    Machine,
    address_width=st.sampled_from([36, 46, 52]),
    max_leaf_level=st.sampled_from([1, 2, 3]),
    execute_only=st.booleans(),
    snoop_control=st.booleans(),
)
OUTCOME = {"mapped": Outcome.MAPPED, "absent": Outcome.ABSENT, "reserved": Outcome.RESERVED}


def rules_of(machine: Machine) -> tuple[WalkRules, WalkRules]:
    largest = Level(machine.max_leaf_level)
    return (
        ept_rules(machine.address_width, largest, execute_only=machine.execute_only),
        second_stage_rules(machine.address_width, largest, snoop_control=machine.snoop_control),
    )


def agree(memory: bytearray, machine: Machine, root: int, levels: int, address: int) -> str:
    """One address by all walkers; says how the walks ended."""
    tables = TableReader(Hpa(BASE), memoryview(memory))
    said = ""
    for rules, slowly in zip(rules_of(machine), (ept_walk, second_stage_walk), strict=True):
        expected: Found | None
        try:
            expected = slowly(RawTables(BASE, memory), machine, root, levels, address)
        except Outside:
            expected = None
        for walker in (walk, walk_module._walk_closely):
            try:
                found = walker(tables, rules, Hpa(root), Level(levels), address)
            except TableOutside:
                assert expected is None, (rules.name, expected)
                continue
            assert expected is not None, (rules.name, found)
            seen = (found.outcome, found.level, found.entry, found.rights)
            assert seen == (OUTCOME[expected.kind], expected.level, expected.entry, expected.rights)
            if found.outcome is Outcome.MAPPED:
                assert found.hpa(address) == expected.hpa
        assert walk_twice(tables, rules, root, levels, address)
        said += f"{expected.kind}{expected.level} " if expected else "outside "
    return said


def walk_twice(tables: TableReader, rules: WalkRules, root: int, levels: int, address: int) -> bool:
    """The fast walk and the close one agree in every field."""
    results: list[Walk | None] = []
    for walker in (walk, walk_module._walk_closely):
        try:
            results.append(walker(tables, rules, Hpa(root), Level(levels), address))
        except TableOutside:
            results.append(None)
    return results[0] == results[1]


@given(st.data())
def test_all_walkers_agree_on_a_path_of_random_entries(data: st.DataObject) -> None:
    machine, levels = data.draw(MACHINE), data.draw(st.sampled_from([4, 5]))
    chain = Chain(levels)
    for level in data.draw(st.sets(st.integers(1, levels), max_size=2)):
        chain.put(level, data.draw(ENTRY))
    agree(chain.memory, machine, BASE, levels, ADDRESS & (1 << 12 + 9 * levels) - 1)


@given(st.data())
def test_all_walkers_agree_when_one_bit_of_a_path_is_flipped(data: st.DataObject) -> None:
    machine, levels = data.draw(MACHINE), data.draw(st.sampled_from([4, 5]))
    chain = Chain(levels)
    if data.draw(st.booleans()):
        level = data.draw(st.sampled_from([2, 3]))
        chain.put(level, HUGE[level])
    level, n = data.draw(st.integers(1, levels)), data.draw(st.integers(0, 63))
    chain.put(level, chain.get(level) ^ 1 << n)
    agree(chain.memory, machine, BASE, levels, ADDRESS & (1 << 12 + 9 * levels) - 1)


def random_tables(random: Random) -> bytearray:
    """Pages full of entries, most of them sound enough for a walk to go on."""
    entries = []
    for _ in range(512 * PAGES):
        page = 0x100 + random.randrange(PAGES) if random.random() < 0.9 else random.getrandbits(40)
        low = random.choice((0x107, 0x107, 0x107, 0x377, 0x3F7, 0x105, 0x102, 0x5A0))
        if random.random() < 0.1:
            low = random.getrandbits(12)
        high = random.choice((0, 0x080, 0x0E0, 0x0E0, 0x400, random.getrandbits(12)))
        entries.append(low | page << 12 | high << 52)
    return bytearray(struct.pack(f"<{len(entries)}Q", *entries))


@pytest.mark.parametrize("seed", range(8))
def test_all_walkers_agree_on_memory_full_of_random_entries(seed: int) -> None:
    random = Random(seed)
    memory = random_tables(random)
    ends: set[str] = set()
    for _ in range(300):
        machine = Machine(
            random.choice((36, 46, 52)),
            random.choice((1, 2, 3)),
            random.random() < 0.5,
            random.random() < 0.5,
        )
        levels = random.choice((4, 5))
        root = BASE + 4096 * random.choice((*range(PAGES), -1, PAGES))
        ends |= set(agree(memory, machine, root, levels, random.getrandbits(12 + 9 * levels)).split())
    assert {"mapped1", "outside", "reserved4", "absent2"} <= ends, "the memory is too dull"


# -- range walks ---------------------------------------------------------------------------------------


def met(chain: Chain, start: int, end: int) -> list[tuple[int, int, int]]:
    tables = TableReader(Hpa(BASE), memoryview(chain.memory))
    span = GfnSpan(Gfn(start), Gfn(end))
    return [
        (entry.gfn, entry.level, entry.entry)
        for entry in walk_range(tables, EPT_AD, Hpa(BASE), Level(chain.levels), span)
    ]


def test_a_range_walk_meets_every_entry_of_the_path_parents_first() -> None:
    chain = Chain(4)
    gfn = (ADDRESS & (1 << 48) - 1) >> 12
    path = [(gfn >> 9 * n << 9 * n, n + 1, chain.get(n + 1)) for n in (3, 2, 1, 0)]
    assert met(chain, 0, 1 << 36) == path
    assert met(chain, gfn, gfn + 1) == path[3:], "of tables those that lie in the span whole"
    assert met(chain, gfn + 1, gfn + 2) == []
    assert met(chain, 0, 0) == []
    assert met(chain, gfn & ~0x1FF, gfn) == []
    assert met(chain, gfn & ~0x1FF, gfn | 0x1FF) == path[3:]
    assert met(chain, gfn & ~0x1FF, (gfn | 0x1FF) + 1) == path[2:]


def test_a_range_walk_meets_a_frozen_entry_and_goes_no_further() -> None:
    chain = Chain(4)
    chain.put(2, 0x5A0)
    assert [(level, entry) for _, level, entry in met(chain, 0, 1 << 36)][-1] == (2, 0x5A0)


def test_a_range_walk_descends_by_the_writers_marker_not_by_rights() -> None:
    chain = Chain(4)
    chain.put(2, chain.get(2) & ~(1 << 59))
    assert met(chain, 0, 1 << 36)[-1][1] == 2
    chain.put(2, 0x0800_0000_0000_0000 | chain.table(1))
    assert met(chain, 0, 1 << 36)[-1][1] == 1


@given(
    st.dictionaries(st.integers(0, 2047), st.integers(1, 1 << 20), max_size=12),
    st.integers(0, 2050),
    st.integers(0, 2050),
)
def test_a_range_walk_meets_exactly_the_leaves_that_overlap(
    leaves: dict[int, int], one: int, other: int
) -> None:
    start, end = sorted((one, other))
    memory = bytearray(7 * 4096)

    def put(page: int, index: int, entry: int) -> None:
        struct.pack_into("<Q", memory, page * 4096 + 8 * index, entry)

    put(0, 0, BASE + 0x1000 | TABLE_BITS)
    put(1, 0, BASE + 0x2000 | TABLE_BITS)
    for i in range(4):
        put(2, i, BASE + 0x3000 + i * 0x1000 | TABLE_BITS)
    for gfn, pfn in leaves.items():
        put(3 + gfn // 512, gfn % 512, pfn << 12 | 0x0E00_0000_0000_0377)
    tables = TableReader(Hpa(BASE), memoryview(memory))
    span = GfnSpan(Gfn(start), Gfn(end))
    found = walk_range(tables, EPT_AD, Hpa(BASE), Level(4), span)
    seen = {entry.gfn: entry.entry >> 12 & 0xFFFFF_FFFFF for entry in found if entry.level == 1}
    assert seen == {gfn: pfn for gfn, pfn in leaves.items() if start <= gfn < end}
