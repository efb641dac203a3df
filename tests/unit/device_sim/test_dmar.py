"""Translation requests against raw tables: what is granted, what is refused and recorded, what is cached."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sim.core.dmar import RemappingUnit, RequestRefused
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from protocol.hostmem import WindowKind
from protocol.hw.caps import make_cap, make_ecap
from protocol.hw.faults import FaultReason
from protocol.units import IovaPfn
from tests.kit.raw_driver import FAULTS
from tests.kit.silicon import (
    DID,
    FRAMES,
    LEAF,
    PFN,
    RID,
    RWX,
    TABLES,
    R,
    Recorded,
    Silicon,
    Tables,
    W,
    X,
    iotlb_domain,
    iotlb_pages,
    pasid_cache,
    pasid_entry,
    window,
)
from tests.oracle.table import Machine, Outside, RawTables, second_stage_walk

SPT_2, SPT_3, SPT_4, SSS_1, SSS_3, SSS_4, SGN_5 = 0x59, 0x5A, 0x5B, 0x78, 0x7A, 0x7B, 0x84


@pytest.fixture
def silicon() -> Silicon:
    attached = Silicon()
    attached.attach()
    return attached


def refused(silicon: Silicon, page: int, need: int = R) -> list[Recorded]:
    """The faults recorded by a request that must be refused."""
    before = silicon.unit.faults.recorded
    with pytest.raises(RequestRefused) as caught:
        silicon.translate(page, need)
    found = silicon.faults()
    assert silicon.unit.faults.recorded == before + 1
    assert [int(caught.value.reason)] == [record.reason for record in found]
    return found


@pytest.mark.parametrize(("level", "frame"), [(1, 77), (2, 512)])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_present_leaf_is_granted_with_its_size_and_rights(levels: int, level: int, frame: int) -> None:
    silicon = Silicon(levels=levels)
    silicon.attach()
    silicon.map(0x1_2345, frame, level=level)
    assert silicon.translate(0x1_2345) == (FRAMES + (frame << 12), level, R | W)


def test_an_absent_entry_gives_no_rights_and_no_fault(silicon: Silicon) -> None:
    silicon.map(7, 1)
    for page in (8, 1 << 9, 1 << 18, 1 << 27, (1 << 36) - 1):
        assert silicon.translate(page)[2] == 0
    assert silicon.faults() == []
    assert silicon.events == 0


def test_an_execute_only_entry_is_absent_for_the_unit(silicon: Silicon) -> None:
    silicon.map(7, 1, rights=X)
    assert silicon.translate(7)[2] == 0
    assert silicon.faults() == []


def test_an_absent_entry_is_never_cached(silicon: Silicon) -> None:
    assert silicon.translate(7)[2] == 0
    assert silicon.unit.iotlb.entries(DID) == []
    silicon.map(7, 1)
    assert silicon.translate(7) == (FRAMES + 4096, 1, R | W), "caching mode is off: no flush was needed"
    assert [page for page, _ in silicon.unit.iotlb.entries(DID)] == [7]


def test_rights_are_those_of_the_whole_path(silicon: Silicon) -> None:
    at = silicon.tables.entry_at(7, 2)
    silicon.map(7, 1, rights=R | W)
    silicon.tables.store(at, silicon.tables.load(at) & ~W)
    assert silicon.translate(7, W)[2] == R
    silicon.map(8, 2, rights=R | W)
    assert silicon.translate(8)[2] == R, "the same through the cached table pointer"
    assert silicon.unit.iotlb.psc_hits == 1


def test_a_cached_entry_serves_until_it_is_invalidated(silicon: Silicon) -> None:
    silicon.map(7, 1)
    silicon.translate(7)
    walks = silicon.unit.walks
    silicon.map(7, 2)
    assert silicon.translate(7)[0] == FRAMES + 0x1000
    assert silicon.unit.walks == walks
    silicon.execute(iotlb_pages(DID, 7))
    assert silicon.translate(7)[0] == FRAMES + 0x2000


def test_a_cached_entry_without_the_right_is_walked_again(silicon: Silicon) -> None:
    silicon.map(7, 1, rights=R)
    assert silicon.translate(7, R)[2] == R
    assert silicon.translate(7, W)[2] == R
    silicon.map(7, 1, rights=R | W)
    assert silicon.translate(7, W)[2] == R | W, "rights were raised: no invalidation is due"


def test_a_cached_table_pointer_without_the_right_is_walked_again(silicon: Silicon) -> None:
    silicon.map(7, 1)
    at = silicon.tables.entry_at(7, 2)
    entry = silicon.tables.load(at)
    silicon.tables.store(at, entry & ~W)
    assert silicon.translate(7, W)[2] == R
    silicon.tables.store(at, entry)
    assert silicon.translate(7, W)[2] == R | W, "rights were raised: no invalidation is due"


def test_the_cached_table_pointer_spares_the_upper_levels_until_it_is_dropped(silicon: Silicon) -> None:
    silicon.map(7, 1)
    silicon.map(8, 2)
    silicon.translate(7)
    root_entry = silicon.tables.load(TABLES)
    silicon.tables.store(TABLES, 0)
    assert silicon.translate(8)[0] == FRAMES + 0x2000, "the root was not read"
    assert silicon.unit.iotlb.psc_hits == 1
    silicon.execute(iotlb_pages(DID, 8, ih=True))
    assert silicon.translate(8)[2] == R | W, "with IH only the leaf went"
    silicon.execute(iotlb_pages(DID, 8))
    assert silicon.translate(8)[2] == 0
    silicon.tables.store(TABLES, root_entry)
    assert silicon.translate(8)[2] == R | W


def test_a_table_pointer_goes_with_the_domain(silicon: Silicon) -> None:
    silicon.map(7, 1)
    silicon.translate(7)
    silicon.tables.store(TABLES, 0)
    silicon.execute(iotlb_domain(DID))
    assert silicon.translate(7)[2] == 0


@pytest.mark.parametrize(
    ("level", "extra"),
    [
        (1, 1 << 62),
        (1, 1 << 46),
        (1, 1 << 51),
        (2, 1 << 11),
        (3, 1 << 11),
        (4, 1 << 11),
        (4, LEAF),
        (2, LEAF | 1 << 12),
        (3, LEAF | 1 << 29),
        (4, 1 << 62),
    ],
)
def test_a_reserved_bit_on_the_path_is_recorded_as_sss_3(silicon: Silicon, level: int, extra: int) -> None:
    silicon.map(7, 1)
    at = silicon.tables.entry_at(7, level)
    silicon.tables.store(at, silicon.tables.load(at) | extra)
    assert refused(silicon, 7) == [Recorded(SSS_3, 7, RID, f=True)]
    assert silicon.unit.iotlb.entries(DID) == []


@pytest.mark.parametrize("extra", [1 << 10, 1 << 11, 1 << 52, 0x1FF << 52, 1 << 63, 7 << 3, 1 << 8, 1 << 9])
def test_an_ignored_bit_in_a_leaf_changes_nothing(silicon: Silicon, extra: int) -> None:
    at = silicon.tables.entry_at(7)
    silicon.tables.store(at, FRAMES | RWX | extra)
    assert silicon.translate(7) == (FRAMES, 1, R | W)


def test_a_leaf_larger_than_the_unit_knows_is_a_reserved_bit() -> None:
    silicon = Silicon(max_page="4K")
    silicon.attach()
    silicon.map(512, 512, level=2)
    assert [record.reason for record in refused(silicon, 512)] == [SSS_3]


def test_a_table_outside_memory_is_recorded_as_sss_1(silicon: Silicon) -> None:
    silicon.tables.store(silicon.tables.entry_at(7, 2), 0x4000_0000 | RWX)
    assert refused(silicon, 7) == [Recorded(SSS_1, 7, RID, f=True)]
    silicon.tables.store(TABLES + 8, 0x1000 | RWX)
    assert refused(silicon, 1 << 27) == [Recorded(SSS_1, 1 << 27, RID, f=True)], "below the window"


@pytest.mark.parametrize("root", [0x4000_0000, FRAMES, 1 << 46, 0])
def test_a_root_where_no_tables_are_is_recorded_as_sss_4(root: int) -> None:
    silicon = Silicon()
    silicon.attach()
    silicon.write_pasid_entry(RID, pasid_entry(root))
    assert refused(silicon, 7) == [Recorded(SSS_4, 7, RID, f=True)]


@pytest.mark.parametrize(
    ("levels", "page", "wide"),
    [(4, 1 << 36, True), (4, (1 << 36) - 1, False), (5, 1 << 36, False), (5, 1 << 45, True)],
)
def test_an_address_beyond_the_width_is_recorded_as_sgn_5(levels: int, page: int, wide: bool) -> None:
    silicon = Silicon(levels=levels)
    silicon.attach()
    if wide:
        assert refused(silicon, page) == [Recorded(SGN_5, page, RID, f=True)]
    else:
        assert silicon.translate(page)[2] == 0


def test_the_units_own_width_counts_too() -> None:
    silicon = Silicon(cap=make_cap(sagaw=0b100, mgaw=39, sslps=3, psi=1, mamv=9))
    silicon.attach()
    assert silicon.translate((1 << 27) - 1)[2] == 0
    assert [record.reason for record in refused(silicon, 1 << 27)] == [SGN_5]


def test_a_width_is_judged_even_if_the_iotlb_could_answer(silicon: Silicon) -> None:
    silicon.map(0, 1)
    silicon.translate(0)
    assert [record.reason for record in refused(silicon, 1 << 36)] == [SGN_5]


def test_a_function_without_a_pasid_entry_is_refused_spt_2() -> None:
    silicon = Silicon()
    assert refused(silicon, 7) == [Recorded(SPT_2, 7, RID, f=True)]
    silicon.write_pasid_entry(RID, bytes(64))
    assert refused(silicon, 7) == [Recorded(SPT_2, 7, RID, f=True)]


@pytest.mark.parametrize(
    "entry",
    [
        pasid_entry(TABLES, pgtt=1),
        pasid_entry(TABLES, pgtt=3),
        pasid_entry(TABLES, pgtt=0),
        pasid_entry(TABLES, pgtt=7),
        pasid_entry(TABLES, aw=0),
        pasid_entry(TABLES, aw=1),
        pasid_entry(TABLES, aw=3),
    ],
)
def test_a_pasid_entry_the_unit_cannot_use_is_refused_spt_4(entry: bytes) -> None:
    silicon = Silicon()
    silicon.write_pasid_entry(RID, entry)
    assert refused(silicon, 7) == [Recorded(SPT_4, 7, RID, f=True)]


@pytest.mark.parametrize("lacking", [{"ssts": 0, "sc": 1}, {"ssts": 1, "sc": 0}])
def test_a_second_stage_entry_needs_the_capabilities_it_uses(lacking: dict[str, int]) -> None:
    silicon = Silicon(ecap=make_ecap(dt=1, smts=1, smpwc=1, **lacking))
    silicon.attach()
    assert [record.reason for record in refused(silicon, 7)] == [SPT_4]


def test_a_pasid_entry_with_reserved_bits_is_refused_spt_3() -> None:
    silicon = Silicon()
    silicon.write_pasid_entry(RID, pasid_entry(TABLES)[:-1] + b"\x01")
    assert refused(silicon, 7) == [Recorded(SPT_3, 7, RID, f=True)]


def test_a_pasid_entry_is_cached_until_the_pasid_cache_is_invalidated(silicon: Silicon) -> None:
    silicon.map(7, 1)
    silicon.translate(7)
    silicon.write_pasid_entry(RID, bytes(64))
    assert silicon.translate(7)[2] == R | W
    silicon.execute(pasid_cache(DID))
    assert [record.reason for record in refused(silicon, 7)] == [SPT_2]


def test_two_domains_with_different_tables_do_not_mix() -> None:
    silicon = Silicon()
    silicon.attach()
    other = Tables(pages=8, base=0x80_0000)
    silicon.memory.add(window(WindowKind.TABLES, other.base, other.memory), lambda: None)
    silicon.write_pasid_entry(0x6A10, pasid_entry(other.root, did=6))
    silicon.map(7, 1)
    other.map(7, PFN + 2)
    for _ in range(2):
        assert silicon.unit.translation_request(RID, IovaPfn(7), R).hpa == FRAMES + 0x1000
        assert silicon.unit.translation_request(0x6A10, IovaPfn(7), R).hpa == FRAMES + 0x2000


def test_functions_of_one_domain_share_its_iotlb(silicon: Silicon) -> None:
    silicon.write_pasid_entry(0x6A10, pasid_entry(TABLES))
    silicon.map(7, 1)
    silicon.translate(7)
    silicon.tables.unmap(7)
    assert silicon.unit.translation_request(0x6A10, IovaPfn(7), R).hpa == FRAMES + 0x1000


def test_faults_beyond_the_records_are_lost_and_counted_apart() -> None:
    silicon = Silicon()
    for page in range(FAULTS + 3):
        with pytest.raises(RequestRefused):
            silicon.translate(page)
    assert [record.page for record in silicon.faults()] == list(range(FAULTS))
    assert (silicon.unit.faults.recorded, silicon.unit.faults.lost) == (FAULTS, 3)
    assert silicon.events == 2, "one for PPF, one for PFO"


def test_a_refused_request_says_which_reason() -> None:
    unit = RemappingUnit(*capabilities(), 46, PhysicalMemory())
    with pytest.raises(RequestRefused, match="SPT_2") as caught:
        unit.translation_request(RID, IovaPfn(0), R)
    assert caught.value.reason is FaultReason.SPT_2


# -- against the oracle --------------------------------------------------------------------------------

PAGES = [0, 1, 7, 511, 512, 513, 1 << 18, (1 << 18) + 5, 1 << 27, (1 << 36) - 1]
ENTRIES = st.tuples(
    st.sampled_from(PAGES),
    st.sampled_from([1, 1, 1, 2, 2, 3, 4]),
    st.sampled_from([0, R, W, X, R | W, RWX]),
    st.sampled_from([0, 0, 0, LEAF, 1 << 11, 1 << 62, 1 << 47, 1 << 58, 0x3F << 3]),
    st.sampled_from([None, 0x1_0000_0000, 0x1_4000_0000, 0x1_0020_0000, 0x1_0000_3000, TABLES + 0x1000]),
)
MACHINE = Machine(address_width=46, max_leaf_level=3, snoop_control=True)


@settings(max_examples=150, deadline=None)
@given(entries=st.lists(ENTRIES, max_size=12), asked=st.lists(st.sampled_from(PAGES), max_size=20))
def test_every_answer_is_the_oracles_cached_or_not(
    entries: list[tuple[int, int, int, int, int | None]], asked: list[int]
) -> None:
    silicon = Silicon()
    silicon.attach()
    tables = silicon.tables
    for page, _, _, _, _ in entries:
        tables.map(page, PFN + page % 1024)
    for page, level, rights, extra, hpa in entries:
        index = page >> 9 * (level - 1) & 511
        at = tables.base + 0x1000 * (4 - level) + 8 * index if page < 1 << 27 else tables.base + 8 * index
        old = tables.load(at) & ~7
        tables.store(at, (old if hpa is None else hpa) | rights | extra)
    oracle = RawTables(TABLES, bytes(tables.memory))
    for page in [*asked, *asked]:
        try:
            expected = second_stage_walk(oracle, MACHINE, TABLES, 4, page << 12)
        except Outside:
            assert [record.reason for record in refused(silicon, page)] == [SSS_1]
            continue
        if expected.kind == "reserved":
            assert [record.reason for record in refused(silicon, page)] == [SSS_3]
        elif expected.kind == "absent":
            assert silicon.translate(page)[2] == 0
        else:
            size = 4096 << 9 * (expected.level - 1)
            assert silicon.translate(page) == (
                expected.hpa // size * size,
                expected.level,
                expected.rights & (R | W),
            )
