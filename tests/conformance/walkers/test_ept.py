"""EPT access cases, as a test of a CPU has them: every right at every level, every bit that must be zero.

The tables are what the manual's say [SDM 29.3.2], [SDM 29.3.3], written as rows of literals, exit
qualifications included: 0x181 is a read of an absent page by its linear address.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.pt.ept_exit import EptAccess, EptExit, ept_exit
from protocol.pt.mem import TableOutside
from protocol.pt.walk import WalkRules, ept_rules
from protocol.units import Level
from tests.conformance.walkers.path import FRAME, OFFSET, SHAPES, Path

MISCONFIG = EptExit(49, 0)  # type: ignore[arg-type]
ACCESS = {"read": EptAccess.READ, "write": EptAccess.WRITE, "fetch": EptAccess.FETCH}
WIDTH = 46
RULES = functools.cache(ept_rules)  # made once: each is some thousand numbers

# Bits 2:0 of one entry, all others being 7: the qualification of each access, 0 if it goes through, None
# for a misconfiguration.
XWR = {
    #        read   write  fetch
    0b000: (0x181, 0x182, 0x184),
    0b001: (0x000, 0x18A, 0x18C),
    0b010: (None, None, None),
    0b011: (0x000, 0x000, 0x19C),
    0b100: (0x1A1, 0x1A2, 0x000),  # execute-only, where the CPU has it
    0b101: (0x000, 0x1AA, 0x000),
    0b110: (None, None, None),
    0b111: (0x000, 0x000, 0x000),
}
EXECUTE_ONLY = 0b100

# Bits that must be 0, by the kind of entry; the address bits beyond MAXPHYADDR are the same everywhere.
TABLE, LEAF = "table", "leaf"
MUST_BE_ZERO = {
    (5, TABLE): {3, 4, 5, 6, 7},
    (4, TABLE): {3, 4, 5, 6, 7},
    (3, TABLE): {3, 4, 5, 6},
    (2, TABLE): {3, 4, 5, 6},
    (3, LEAF): set(range(12, 30)),
    (2, LEAF): set(range(12, 21)),
    (1, LEAF): set[int](),
}
IGNORED = {8, 9, 10, 11, *range(52, 64)}  # 8 and 9 are A and D where those are on: no rule about them either

MEMORY_TYPES = {0: "UC", 1: "WC", 2: None, 3: None, 4: "WT", 5: "WP", 6: "WB", 7: None}


def ends(
    path: Path, access: str, *, width: int = WIDTH, huge: int = 3, execute_only: bool = True
) -> EptExit | None:
    found = path.walk(RULES(width, Level(huge), execute_only=execute_only))
    exited = ept_exit(found, ACCESS[access])
    assert exited is not None or found.hpa(OFFSET) == FRAME | OFFSET
    return exited


def violation(qualification: int) -> EptExit | None:
    return EptExit(48, qualification) if qualification else None  # type: ignore[arg-type]


@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
@pytest.mark.parametrize("xwr", XWR)
def test_each_combination_of_rights_at_each_level_ends_as_the_table_says(
    levels: int, leaf: int, xwr: int
) -> None:
    for level in range(leaf, levels + 1):
        path = Path(levels, leaf)
        path.rights(level, xwr)
        for access, expected in zip(ACCESS, XWR[xwr], strict=True):
            wanted = MISCONFIG if expected is None else violation(expected)
            assert ends(path, access) == wanted, (level, access)
            if xwr == EXECUTE_ONLY:
                assert ends(path, access, execute_only=False) == MISCONFIG, (level, access)
            else:
                assert ends(path, access, execute_only=False) == wanted, (level, access)


# Rights of two entries of one path: what is left is the AND; rows are (upper, lower, access, qualification).
PAIRS = [
    (0b101, 0b011, "read", 0),
    (0b101, 0b011, "write", 0x18A),
    (0b101, 0b011, "fetch", 0x18C),
    (0b011, 0b101, "fetch", 0x18C),
    (0b100, 0b101, "fetch", 0),
    (0b100, 0b101, "read", 0x1A1),
    (0b100, 0b011, "read", 0x181),  # nothing is left, though every entry is present
    (0b001, 0b000, "read", 0x181),
    (0b000, 0b001, "write", 0x182),
]


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("upper", "lower", "access", "qualification"), PAIRS)
def test_the_rights_of_a_path_are_those_every_entry_gives(
    levels: int, upper: int, lower: int, access: str, qualification: int
) -> None:
    for below, above in itertools.combinations(range(1, levels + 1), 2):
        path = Path(levels)
        path.rights(above, upper)
        path.rights(below, lower)
        assert ends(path, access) == violation(qualification), (above, below)


@pytest.mark.parametrize("width", [36, 39, 46, 52])
@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
def test_every_single_bit_that_must_be_zero_is_a_misconfiguration_and_no_other_is(
    levels: int, leaf: int, width: int
) -> None:
    for level in range(leaf, levels + 1):
        kind = LEAF if level == leaf else TABLE
        reserved = MUST_BE_ZERO[level, kind] | set(range(width, 52))
        for bit in sorted(reserved | IGNORED | ({7} if level == 1 else set())):
            path = Path(levels, leaf)
            path.set(level, bit)
            for access in ACCESS:
                wanted = MISCONFIG if bit in reserved else None
                assert ends(path, access, width=width) == wanted, (level, bit, access)


@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
@pytest.mark.parametrize("memory_type", MEMORY_TYPES)
def test_a_leafs_memory_type_must_be_one_that_exists(levels: int, leaf: int, memory_type: int) -> None:
    path = Path(levels, leaf)
    path.put(leaf, path.get(leaf) & ~0x38 | memory_type << 3)
    wanted = None if MEMORY_TYPES[memory_type] else MISCONFIG
    assert {ends(path, access) for access in ACCESS} == {wanted}
    path.set(leaf, 6)  # IPAT changes nothing about it
    assert {ends(path, access) for access in ACCESS} == {wanted}


# (largest leaf the CPU has, level of a leaf): does it walk?
PAGE_SIZES = {
    (1, 1): True,
    (1, 2): False,
    (1, 3): False,
    (2, 2): True,
    (2, 3): False,
    (3, 2): True,
    (3, 3): True,
}


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("huge", "leaf"), PAGE_SIZES)
def test_a_leaf_larger_than_the_cpu_has_is_a_misconfiguration(levels: int, huge: int, leaf: int) -> None:
    wanted = None if PAGE_SIZES[huge, leaf] else MISCONFIG
    assert {ends(Path(levels, leaf), access, huge=huge) for access in ACCESS} == {wanted}


@pytest.mark.parametrize("xwr", [0b001, 0b011, 0b101, 0b111])
def test_an_absent_entry_is_a_violation_whatever_its_other_bits_hold(xwr: int) -> None:
    for level in (1, 2, 3, 4):
        path = Path(4)
        path.put(level, ~0 & (1 << 64) - 1 & ~7)
        path.rights(4 if level != 4 else 3, xwr)
        assert ends(path, "read") == violation(0x181)


@pytest.mark.parametrize("levels", [4, 5])
def test_a_misconfiguration_below_goes_before_a_right_missing_above(levels: int) -> None:
    for below, above in itertools.combinations(range(1, levels + 1), 2):
        path = Path(levels)
        path.rights(above, 0b001)
        path.set(below, 50)
        assert ends(path, "write") == MISCONFIG


@pytest.mark.parametrize("levels", [4, 5])
def test_an_absent_entry_above_hides_a_misconfiguration_below(levels: int) -> None:
    for below, above in itertools.combinations(range(1, levels + 1), 2):
        path = Path(levels)
        path.rights(above, 0)
        path.set(below, 50)
        assert ends(path, "write") == violation(0x182)


# Accesses to a guest paging structure whose EPT leaf has these rights: bit 8 is clear, and with A/D flags
# the access is a write too.  Rows: (leaf's XWR, A/D on, the access is an update, qualification).
PAGING_STRUCTURES = [
    (0b000, False, False, 0x081),
    (0b000, False, True, 0x082),
    (0b000, True, False, 0x083),
    (0b000, True, True, 0x083),
    (0b001, False, False, 0x000),
    (0b001, False, True, 0x08A),
    (0b001, True, False, 0x08B),
    (0b101, True, False, 0x0AB),
    (0b011, True, False, 0x000),
    (0b111, True, True, 0x000),
]


@pytest.mark.parametrize(("xwr", "ad_enabled", "write", "qualification"), PAGING_STRUCTURES)
def test_a_guest_paging_structure_is_written_too_where_ept_has_ad_flags(
    xwr: int, ad_enabled: bool, write: bool, qualification: int
) -> None:
    path = Path(4)
    path.rights(1, xwr)
    access = EptAccess.WRITE if write else EptAccess.READ
    if ad_enabled:  # then always a write as well [SDM 29.3.3.2]
        access = EptAccess.READ | EptAccess.WRITE
    found = path.walk(RULES(WIDTH, Level(3)))
    assert ept_exit(found, access, final=False) == violation(qualification)


@pytest.mark.parametrize(("levels", "leaf"), SHAPES)
def test_accessed_and_dirty_bits_decide_nothing(levels: int, leaf: int) -> None:
    for level, bit in itertools.product(range(leaf, levels + 1), (8, 9)):
        path = Path(levels, leaf)
        path.set(level, bit)
        assert [ends(path, access) for access in ACCESS] == [None] * 3


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
        test_every_single_bit_that_must_be_zero_is_a_misconfiguration_and_no_other_is(levels, leaf, WIDTH)
        for memory_type in MEMORY_TYPES:
            test_a_leafs_memory_type_must_be_one_that_exists(levels, leaf, memory_type)


# Rules with one thing wrong each.
PLANTED: dict[str, Spoil] = {
    **{
        f"bit {bit} may be set in a table entry of level {level}": table_bit(level, bit)
        for level, bit in ((5, 7), (4, 3), (3, 6), (2, 5), (2, 51))
    },
    **{
        f"bit {bit} may be set in a leaf of level {level}": leaf_bit(level, bit)
        for level, bit in ((3, 12), (3, 29), (2, 20), (1, 46))
    },
    "bit 11 is reserved": lambda rules: replace(
        rules, reserved_leaf=tuple(mask | 1 << 11 for mask in rules.reserved_leaf)
    ),
    "X alone makes nothing present": lambda rules: replace(rules, present=3),
    "write-only is legal": lambda rules: replace(
        rules, illegal=frozenset(low for low in rules.illegal if low & 7 != 0b010)
    ),
    "memory type 7 exists": lambda rules: replace(
        rules, illegal=frozenset(low for low in rules.illegal if low >> 3 != 7)
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_rules_with_one_thing_wrong_fail_the_suite(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = functools.cache(lambda *given, **named: PLANTED[what](ept_rules(*given, **named)))
    monkeypatch.setattr(sys.modules[__name__], "RULES", wrong)
    with pytest.raises((AssertionError, TableOutside)):
        every_row()
