"""Second-stage cases: every right at every level, every reserved bit, and the fault reason of each.

The tables are the manual's [VT-d 9.8], [VT-d 7.1.3], as rows of literals.  Each row is tried on the walk by
itself and on a whole remapping unit that is asked for a translation: the unit records what is wrong with
an entry, and answers a missing page or right with fewer rights and no fault.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from device_sim.core.dmar import RemappingUnit, RequestRefused
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from protocol.hostmem import WindowKind
from protocol.hw.faults import RECOVERABLE
from protocol.hw.second_stage import second_stage_fault
from protocol.pt.mem import TableOutside
from protocol.pt.walk import WalkRules, second_stage_rules
from protocol.units import IovaPfn, Level
from tests.conformance.walkers.path import BASE, FRAME, OFFSET, SHAPES, Path, address, table_at
from tests.kit.raw_driver import RawDriver
from tests.kit.silicon import RID, pasid_entry, window

HAW = 46
RULES = functools.cache(second_stage_rules)  # made once: each is some thousand numbers
SSS_1, SSS_2, SSS_3, SSS_4 = 0x78, 0x79, 0x7A, 0x7B
SGN_5, SGN_6, SGN_7, SGN_8 = 0x84, 0x85, 0x86, 0x87
REQUEST = {"read": (True, False), "write": (False, True), "atomic": (True, True)}

# Bits 2:0 of one entry, all others being 7: the fault reason of each request, 0 if it goes through.
XWR = {
    #        read   write  atomic
    0b000: (SSS_2, SSS_2, SSS_2),
    0b001: (0, SGN_6, SGN_6),
    0b010: (SGN_7, 0, SGN_7),  # write-only is legal here
    0b011: (0, 0, 0),
    0b100: (SSS_2, SSS_2, SSS_2),  # X makes nothing present
    0b101: (0, SGN_6, SGN_6),
    0b110: (SGN_7, 0, SGN_7),
    0b111: (0, 0, 0),
}

TABLE, LEAF = "table", "leaf"
RESERVED = {
    (5, TABLE): {7, 11, 62},
    (4, TABLE): {7, 11, 62},
    (3, TABLE): {11, 62},
    (2, TABLE): {11, 62},
    (3, LEAF): {62, *range(12, 30)},
    (2, LEAF): {62, *range(12, 21)},
    (1, LEAF): {62},
}
SNP = 11  # in a leaf: the snoop bit, reserved where the unit has no snoop control
IGNORED = {2, 3, 4, 5, 6, 8, 9, 10, *range(52, 62), 63}


def reason(path: Path, request: str, *, haw: int = HAW, huge: int = 3, snoop_control: bool = True) -> int:
    rules = RULES(haw, Level(huge), snoop_control=snoop_control)
    read, write = REQUEST[request]
    return second_stage_fault(path.walk(rules), OFFSET, read=read, write=write) or 0


class UnitOver:
    """A remapping unit with that path for its table, and its driver."""

    def __init__(self, path: Path, haw: int, max_page: str, root: int) -> None:
        memory = PhysicalMemory()
        memory.add(window(WindowKind.TABLES, BASE, path.memory), lambda: None)
        cap, ecap = capabilities(levels=path.levels, max_page=max_page)
        self.unit = RemappingUnit(cap, ecap, haw, memory)
        self.driver = RawDriver(self.unit, memory)
        self.driver.write_pasid_entry(RID, pasid_entry(root, path.levels))


def unit_over(path: Path, *, haw: int = HAW, max_page: str = "1G", root: int | None = None) -> UnitOver:
    return UnitOver(path, haw, max_page, table_at(path.levels) if root is None else root)


def unit_answers(over: UnitOver, page: int) -> tuple[int, int]:
    """(fault reason recorded or 0, rights granted)."""
    unit = over.unit
    unit.iotlb.invalidate_all()
    rights, refused = 0, 0
    try:
        rights = unit.translation_request(RID, IovaPfn(page), 1).rights
    except RequestRefused as refusal:
        refused = int(refusal.reason)
    assert [record[12] for record in over.driver.take_faults()] == ([refused] if refused else [])
    return refused, rights


@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
@pytest.mark.parametrize("xwr", XWR)
def test_each_combination_of_rights_at_each_level_ends_as_the_table_says(
    levels: int, leaf: int, xwr: int
) -> None:
    for level in range(leaf, levels + 1):
        path = Path(levels, leaf)
        path.rights(level, xwr)
        assert tuple(reason(path, request) for request in REQUEST) == XWR[xwr], level
        granted = sum(bit for bit, why in zip((1, 2), XWR[xwr], strict=False) if not why)
        assert unit_answers(unit_over(path), address(levels) >> 12) == (0, granted), level


def test_what_a_unit_answers_without_a_fault_is_what_a_device_may_turn_into_a_page_request() -> None:
    seen = {why for row in XWR.values() for why in row if why}
    assert {int(why) for why in RECOVERABLE} == seen


@pytest.mark.parametrize("levels", [4, 5])
def test_the_rights_of_a_path_are_those_every_entry_gives(levels: int) -> None:
    for below, above in itertools.combinations(range(1, levels + 1), 2):
        path = Path(levels)
        path.rights(above, 0b001)
        path.rights(below, 0b010)
        assert [reason(path, request) for request in REQUEST] == [SGN_7, SGN_6, SGN_6]
        assert unit_answers(unit_over(path), address(levels) >> 12) == (0, 0)


@pytest.mark.parametrize("haw", [36, 39, 46, 52])
@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
def test_every_single_reserved_bit_is_sss_3_and_no_other_is(levels: int, leaf: int, haw: int) -> None:
    path = Path(levels, leaf)
    unit = unit_over(path, haw=haw)
    for level in range(leaf, levels + 1):
        kind = LEAF if level == leaf else TABLE
        reserved = RESERVED[level, kind] | set(range(haw, 52))
        others = IGNORED | ({SNP} if kind == LEAF else set()) | ({7} if level == 1 else set())
        good = path.get(level)
        for bit in sorted(reserved | others):
            path.put(level, good | 1 << bit)
            wanted = SSS_3 if bit in reserved else 0
            assert [reason(path, request, haw=haw) for request in REQUEST] == [wanted] * 3, (level, bit)
            answer = unit_answers(unit, address(levels) >> 12)
            assert answer == (wanted, 0 if wanted else 3), (level, bit)
        path.put(level, good)


@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
def test_the_snoop_bit_of_a_leaf_is_reserved_without_snoop_control(levels: int, leaf: int) -> None:
    path = Path(levels, leaf)
    path.set(leaf, SNP)
    assert reason(path, "read", snoop_control=False) == SSS_3
    assert reason(path, "read", snoop_control=True) == 0


# (SSLPS allows, level of a leaf): does it walk?
PAGE_SIZES = {
    ("4K", 1): True,
    ("4K", 2): False,
    ("4K", 3): False,
    ("2M", 2): True,
    ("2M", 3): False,
    ("1G", 3): True,
}


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("size", "leaf"), PAGE_SIZES)
def test_a_leaf_larger_than_the_unit_supports_is_sss_3(levels: int, size: str, leaf: int) -> None:
    path = Path(levels, leaf)
    wanted = 0 if PAGE_SIZES[size, leaf] else SSS_3
    huge = {"4K": 1, "2M": 2, "1G": 3}[size]
    assert {reason(path, request, huge=huge) for request in REQUEST} == {wanted}
    assert unit_answers(unit_over(path, max_page=size), address(levels) >> 12)[0] == wanted


def test_an_absent_entry_hides_its_own_other_bits_and_what_is_wrong_below() -> None:
    for level in (1, 2, 3, 4):
        path = Path(4)
        path.put(level, (1 << 64) - 1 & ~3)
        assert reason(path, "read") == SSS_2
        if level > 1:
            path.set(level - 1, 62)
            assert reason(path, "read") == SSS_2


def test_a_reserved_bit_below_goes_before_a_right_missing_above() -> None:
    for below, above in itertools.combinations(range(1, 5), 2):
        path = Path(4)
        path.rights(above, 0b001)
        path.set(below, 62)
        assert reason(path, "write") == SSS_3


# Page numbers and whether a root of so many levels translates them: 2^48 and 2^57 bytes are the ends.
WIDTHS = [
    (4, (1 << 36) - 1, True),
    (4, 1 << 36, False),
    (5, 1 << 36, True),
    (5, (1 << 45) - 1, True),
    (5, 1 << 45, False),
]


@pytest.mark.parametrize(("levels", "page", "within"), WIDTHS)
def test_an_address_beyond_the_roots_width_is_sgn_5(levels: int, page: int, within: bool) -> None:
    assert unit_answers(unit_over(Path(levels)), page) == (0 if within else SGN_5, 0)


def test_a_root_outside_the_units_address_width_is_sss_4() -> None:
    assert unit_answers(unit_over(Path(4), root=1 << HAW), 0) == (SSS_4, 0)
    assert unit_answers(unit_over(Path(4), root=FRAME), 0) == (SSS_4, 0)  # nor where no table memory is


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_table_where_no_table_memory_is_is_sss_1(level: int) -> None:
    path = Path(4)
    path.put(level, FRAME | 7)
    assert unit_answers(unit_over(path), address(4) >> 12) == (SSS_1, 0)


@pytest.mark.parametrize(
    ("frame", "wanted"), [(0xFEDF_F000, 0), (0xFEE0_0000, SGN_8), (0xFEEF_F000, SGN_8), (0xFEF0_0000, 0)]
)
def test_a_translation_into_the_interrupt_range_is_sgn_8(frame: int, wanted: int) -> None:
    path = Path(4)
    path.put(1, frame | 3)
    assert reason(path, "write") == wanted


Spoil = Callable[[WalkRules], WalkRules]


def without(masks: tuple[int, ...], level: int, bit: int) -> tuple[int, ...]:
    return tuple(mask & ~(1 << bit) if n == level else mask for n, mask in enumerate(masks))


def table_bit(level: int, bit: int) -> Spoil:
    return lambda rules: replace(rules, reserved_table=without(rules.reserved_table, level, bit))


def leaf_bit(level: int, bit: int) -> Spoil:
    return lambda rules: replace(rules, reserved_leaf=without(rules.reserved_leaf, level, bit))


def every_row() -> None:
    for levels, leaf in SHAPES:
        for xwr in XWR:
            test_each_combination_of_rights_at_each_level_ends_as_the_table_says(levels, leaf, xwr)
        test_every_single_reserved_bit_is_sss_3_and_no_other_is(levels, leaf, HAW)


# Rules with one thing wrong each.
PLANTED: dict[str, Spoil] = {
    **{
        f"bit {bit} may be set in a table entry of level {level}": table_bit(level, bit)
        for level, bit in ((5, 7), (4, 11), (3, 11), (2, 62), (2, 51))
    },
    "a leaf of 2 MiB may be misaligned": leaf_bit(2, 20),
    "X makes an entry present": lambda rules: replace(rules, present=7),
    "write-only is illegal": lambda rules: replace(
        rules, illegal=frozenset(low for low in range(64) if low & 3 == 0b10)
    ),
    "memory types are looked at": lambda rules: replace(
        rules, illegal=frozenset(low for low in range(64) if low >> 3 == 7)
    ),
    "bit 63 is reserved": lambda rules: replace(
        rules, reserved_leaf=tuple(mask | 1 << 63 for mask in rules.reserved_leaf)
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_rules_with_one_thing_wrong_fail_the_suite(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = functools.cache(lambda *given, **named: PLANTED[what](second_stage_rules(*given, **named)))
    monkeypatch.setattr(sys.modules[__name__], "RULES", wrong)
    with pytest.raises((AssertionError, TableOutside)):
        every_row()
