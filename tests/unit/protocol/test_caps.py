"""Capability registers against values worked by hand from their table [VT-d 10.4]."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.caps import CAP_LAYOUT, ECAP_LAYOUT, Cap, Ecap, make_cap, make_ecap

CAP = 0x00D2_008C_202F_0C86
ECAP = 0x0003_4D98_2000_50C7


def test_cap_has_the_bits_of_the_table() -> None:
    made = make_cap(
        nd=6,
        cm=True,
        sagaw=0b1100,
        mgaw=48,
        fro=0x200,
        sslps=0b11,
        psi=True,
        nfr=1,
        mamv=18,
        dwd=True,
        drd=True,
    )
    assert made.value == CAP


def test_ecap_has_the_bits_of_the_table() -> None:
    made = make_ecap(
        c=True,
        qi=True,
        dt=True,
        pt=True,
        sc=True,
        iro=0x500,
        prs=True,
        pss=20,
        pasid=True,
        pds=True,
        smts=True,
        ssts=True,
        smpwc=True,
        rps=True,
    )
    assert made.value == ECAP


def test_accessors_read_what_the_registers_say() -> None:
    cap, ecap = Cap(CAP), Ecap(ECAP)
    assert (cap.nd, cap.domain_ids) == (6, 1 << 16)
    assert (cap.sagaw, sorted(cap.levels)) == (0b1100, [4, 5])
    assert (cap.mgaw, cap.fro, cap.nfr, cap.mamv) == (48, 0x200, 1, 18)
    assert (cap.cm, cap.psi, cap.dwd, cap.drd, cap.rwbf, cap.fs5lp) == (True, True, True, True, False, False)
    assert (ecap.pss, ecap.iro) == (20, 0x500)
    assert (ecap.sc, ecap.smts, ecap.smpwc, ecap.ssts, ecap.prs, ecap.dt) == (True,) * 6
    assert (ecap.fsts, ecap.ssads, ecap.nest, ecap.mts) == (False,) * 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("zlr", 1 << 22),
        ("pi", 1 << 59),
        ("fs5lp", 1 << 60),
        ("ecmds", 1 << 61),
        ("esirtps", 1 << 62),
        ("esrtps", 1 << 63),
    ],
)
def test_single_bits_of_cap(field: str, value: int) -> None:
    assert make_cap(**{field: True}).value == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mts", 1 << 25),
        ("nest", 1 << 26),
        ("srs", 1 << 31),
        ("nwfs", 1 << 33),
        ("ssads", 1 << 45),
        ("ssts", 1 << 46),
        ("fsts", 1 << 47),
        ("smpwc", 1 << 48),
        ("rprivs", 1 << 53),
    ],
)
def test_single_bits_of_ecap(field: str, value: int) -> None:
    assert make_ecap(**{field: True}).value == value


@pytest.mark.parametrize(("sslps", "level"), [(0b00, 1), (0b01, 2), (0b11, 3), (0b10, 3)])
def test_highest_superpage_bit_gives_the_largest_leaf(sslps: int, level: int) -> None:
    assert make_cap(sslps=sslps).max_huge_page_level == level


@pytest.mark.parametrize(("sagaw", "levels"), [(0, set()), (0b10, {3}), (0b100, {4}), (0b1110, {3, 4, 5})])
def test_sagaw_gives_the_levels_of_a_root(sagaw: int, levels: set[int]) -> None:
    assert make_cap(sagaw=sagaw).levels == levels


@given(st.integers(0, (1 << 64) - 1))
def test_rebuilding_a_register_from_its_fields_changes_no_field(value: int) -> None:
    cap, ecap = Cap(value), Ecap(value)
    cap2 = make_cap(**{name: getattr(cap, name) for name in CAP_LAYOUT})
    ecap2 = make_ecap(**{name: getattr(ecap, name) for name in ECAP_LAYOUT})
    assert all(getattr(cap, name) == getattr(cap2, name) for name in CAP_LAYOUT)
    assert all(getattr(ecap, name) == getattr(ecap2, name) for name in ECAP_LAYOUT)
    assert cap2.value & ~value == 0
    assert ecap2.value & ~value == 0


@pytest.mark.parametrize(
    "fields",
    [{"mgaw": 65}, {"mgaw": 0}, {"mamv": 64}, {"fro": 0x208}, {"psi": 2}, {"nfr": 257}, {"sllps": 1}],
)
def test_register_of_ours_past_a_limit_is_an_assertion(fields: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned|is no field of this register"):
        make_cap(**fields)


@pytest.mark.parametrize("fields", [{"pss": 33}, {"iro": 0x4000}, {"slts": 1}])
def test_extended_register_of_ours_past_a_limit_is_an_assertion(fields: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned|is no field of this register"):
        make_ecap(**fields)
