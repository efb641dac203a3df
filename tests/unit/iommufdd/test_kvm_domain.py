"""What the driver demands of a table and of a unit, and the PASID entry it writes, byte for byte."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from iommufdd.core.kvm_domain import KvmDomain, check_metadata
from protocol.errors import UapiError
from protocol.hw.caps import Cap, Ecap
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import LEVEL_1G, Hpa, Level

# Bit positions as in the registers' tables.
SC, SMTS, SSTS, FSTS, SMPWC = 1 << 7, 1 << 43, 1 << 46, 1 << 47, 1 << 48
ECAP = SC | SMTS | SSTS | SMPWC
SAGAW_3, SAGAW_4, SAGAW_5 = 1 << 9, 1 << 10, 1 << 11
HUGE_2M, HUGE_1G = 1 << 34, 1 << 35


def mgaw(width: int) -> int:
    return (width - 1) << 16


CAP = SAGAW_4 | SAGAW_5 | HUGE_2M | HUGE_1G | mgaw(57)
BIT_11 = ((0x800,) * 5, (0x800,) * 5)
META = ExportedTdpMeta(1, Level(4), Hpa(0x1_2345_6000), Level(3), BIT_11)


def missing(*, cap: int = CAP, ecap: int = ECAP, level: int = 4, huge: int = 3) -> str | None:
    domain = KvmDomain(META.root_hpa, Level(level), 2, Level(huge))
    return domain.what_is_missing(Cap(cap), Ecap(ecap))


@pytest.mark.parametrize("level", [4, 5])
@pytest.mark.parametrize("huge", [1, 2, 3])
def test_a_unit_with_everything_walks_every_table(level: int, huge: int) -> None:
    assert missing(level=level, huge=huge) is None


@pytest.mark.rfc("RFC-48", "RFC-49", "RFC-50", "RFC-51")
@pytest.mark.defect("B-15", "B-17", "B-32")
@pytest.mark.parametrize(
    ("cap", "ecap", "level", "huge", "why"),
    [
        (CAP, ECAP & ~SMTS, 4, 3, "ECAP.SMTS"),
        (CAP, ECAP & ~SC, 4, 3, "ECAP.SC"),
        (CAP, ECAP & ~SMPWC, 4, 3, "ECAP.SMPWC"),
        (CAP, ECAP & ~SSTS, 4, 3, "ECAP.SSTS"),
        (CAP, ECAP & ~SSTS | FSTS, 4, 3, "ECAP.SSTS"),
        (CAP & ~HUGE_1G, ECAP, 4, 3, "leaves of level 3"),
        (CAP & ~(HUGE_1G | HUGE_2M), ECAP, 4, 2, "leaves of level 2"),
        (CAP & ~SAGAW_5, ECAP, 5, 3, "root of 5 levels"),
        (CAP & ~SAGAW_4, ECAP, 4, 3, "root of 4 levels"),
        (CAP & ~mgaw(64) | mgaw(47), ECAP, 4, 3, "48 address bits"),
        (CAP & ~mgaw(64) | mgaw(48), ECAP, 5, 3, "57 address bits"),
        (CAP | 1 << 7, ECAP, 4, 3, "caching mode"),
    ],
)
def test_each_missing_capability_gives_its_own_reason(
    cap: int, ecap: int, level: int, huge: int, why: str
) -> None:
    """B-15: a first stage only; B-17: widths compared with widths, not with an agaw; B-32: caching mode."""
    found = missing(cap=cap, ecap=ecap, level=level, huge=huge)
    assert found is not None
    assert why in found
    assert ";" not in found, "no other reason is claimed"


def test_all_reasons_are_given_at_once_in_the_order_of_the_checks() -> None:
    found = missing(cap=SAGAW_3 | 1 << 7, ecap=0)
    assert found is not None
    names = ("SMTS", "(ECAP.SC)", "SSTS", "SAGAW", "MGAW", "SMPWC", "SSLPS", "CAP.CM")
    places = [found.index(name) for name in names]
    assert places == sorted(places)
    assert found.count(";") == len(names) - 1


@pytest.mark.parametrize(("cap", "huge"), [(CAP & ~HUGE_2M, 3), (CAP & ~HUGE_2M, 2), (CAP & ~HUGE_1G, 2)])
def test_the_largest_leaf_decides_as_in_fls(cap: int, huge: int) -> None:
    assert missing(cap=cap, huge=huge) is None


def refusal(meta: ExportedTdpMeta, flags: int = 0) -> tuple[int, str]:
    with pytest.raises(UapiError) as caught:
        check_metadata(meta, flags)
    return caught.value.errno, caught.value.why


def test_good_metadata_passes() -> None:
    check_metadata(META, 0)
    check_metadata(replace(META, level=Level(5)), 0)


@pytest.mark.rfc("RFC-43", "RFC-44")
@pytest.mark.defect("B-16")
@pytest.mark.parametrize("flags", [1, 2, 1 << 31])
def test_every_flag_is_refused(flags: int) -> None:
    """B-16: DIRTY_TRACKING and unknown bits were ignored."""
    assert refusal(META, flags)[0] == errno.EOPNOTSUPP


def test_a_nest_parent_is_refused_with_the_series_reason() -> None:
    assert "faults of a nested domain are not handled" in refusal(META, 1)[1]


@pytest.mark.rfc("RFC-45", "RFC-46")
@pytest.mark.parametrize(
    ("meta", "number", "why"),
    [
        (replace(META, type=0), errno.EINVAL, "type 0"),
        (replace(META, type=2), errno.EINVAL, "type 2"),
        (replace(META, level=Level(3)), errno.EOPNOTSUPP, "3 levels"),
        (replace(META, level=Level(6)), errno.EOPNOTSUPP, "6 levels"),
    ],
)
def test_a_table_of_another_kind_is_refused(meta: ExportedTdpMeta, number: int, why: str) -> None:
    found, text = refusal(meta)
    assert found == number
    assert why in text


@pytest.mark.rfc("RFC-47")
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_every_mask_must_promise_bit_11(row: int, level: int) -> None:
    rows = [[0x800 | 1 << 62] * 5, [0x800 | 1 << 51] * 5]
    check_metadata(replace(META, rsvd_bits_mask=(tuple(rows[0]), tuple(rows[1]))), 0)
    rows[row][level - 1] ^= 0x800
    number, why = refusal(replace(META, rsvd_bits_mask=(tuple(rows[0]), tuple(rows[1]))))
    assert number == errno.EOPNOTSUPP
    assert f"level {level}" in why


def test_metadata_is_checked_in_the_order_flags_type_level_masks() -> None:
    bad = ExportedTdpMeta(9, Level(3), Hpa(0), Level(3), ((0,) * 5, (0,) * 5))
    assert "flags" in refusal(bad, 4)[1]
    assert "type 9" in refusal(bad)[1]
    assert "3 levels" in refusal(replace(bad, type=1))[1]
    assert "bit 11" in refusal(replace(bad, type=1, level=Level(4)))[1]


@pytest.mark.rfc("RFC-58")
@pytest.mark.parametrize(
    ("level", "root", "did", "ecap", "literal"),
    [
        (4, 0x1_2345_6000, 0x0002, ECAP, "8960452301000000 0200800100000000"),
        (5, 0x1_2345_6000, 0xBEEF, ECAP, "8d60452301000000 efbe800100000000"),
        (4, 0xF_FFFF_FFFF_F000, 0xFFFF, ECAP, "89f0ffffffff0f00 ffff800100000000"),
        (4, 0x10_0000, 0x0002, ECAP & ~SMPWC, "8900100000000000 0200000100000000"),
    ],
)
def test_the_pasid_entry_is_these_64_bytes(level: int, root: int, did: int, ecap: int, literal: str) -> None:
    """P, AW 2 or 3, PGTT 2 and the root; DID, PWSNP, PGSNP; the other six words zero: no SSADE, no FPD."""
    domain = KvmDomain(Hpa(root), Level(level), did, LEVEL_1G)
    assert domain.pasid_entry(Ecap(ecap)).to_bytes() == bytes.fromhex(literal) + bytes(48)


@pytest.mark.parametrize(("level", "width"), [(4, 48), (5, 57)])
def test_a_domain_is_as_wide_as_its_root_is_deep(level: int, width: int) -> None:
    assert KvmDomain(Hpa(0), Level(level), 2, LEVEL_1G).width == width
