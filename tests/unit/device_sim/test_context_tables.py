"""The way from a function to its table, entry by entry in memory: what each level refuses, what is cached."""

from __future__ import annotations

import pytest

from device_sim.core.dmar import RequestRefused
from device_sim.core.pri import PageAccess
from protocol.hw.qi import ResponseCode
from protocol.units import IovaPfn
from tests.kit.raw_driver import GCMD, QIE, RTADDR, SRTP, TE
from tests.kit.silicon import (
    DID,
    FRAMES,
    RID,
    TABLES,
    R,
    Silicon,
    descriptor,
    fault_record,
    iotlb_global,
    pasid_cache,
    pasid_entry,
)

OTHER = 0x6A10
SRT_1, SRT_2, SRT_3, RTA_4 = 0x38, 0x39, 0x3A, 0x33
SCT_1, SCT_2, SCT_3, SCT_5, SCT_8, SCT_9 = 0x40, 0x41, 0x42, 0x44, 0x47, 0x48
SPD_1, SPD_2, SPD_3, SPT_1, SPT_2, SPT_3 = 0x50, 0x51, 0x52, 0x58, 0x59, 0x5A
NOWHERE = 0x7000_0000


@pytest.fixture
def silicon() -> Silicon:
    attached = Silicon()
    attached.attach()
    attached.map(7, 1)
    return attached


def context_cache(kind: int, *, did: int = 0, sid: int = 0, fm: int = 0) -> bytes:
    return descriptor(1 | kind << 4 | did << 16 | sid << 32 | fm << 48)


def pasid_cache_of(kind: int, did: int, pasid: int = 0) -> bytes:
    return descriptor(7 | kind << 4 | did << 16 | pasid << 32)


def asks(silicon: Silicon, rid: int = RID) -> int:
    """0 if page 7 is granted, or the reason of the refusal."""
    try:
        entry = silicon.unit.translation_request(rid, IovaPfn(7), R)
    except RequestRefused as refused:
        return int(refused.reason)
    assert entry.hpa == FRAMES + 0x1000
    return 0


# -- what each level refuses ---------------------------------------------------------------------------


def spoiled(silicon: Silicon, what: str) -> None:
    """Change one thing in memory, before anything of it is cached."""
    driver = silicon.driver
    root, context, directory = driver.root_entry(RID), driver.context_entry(RID), driver.directory(RID)
    table = driver.get(directory) & ~0xFFF
    context_word = driver.get(context)
    {
        "root entry absent": lambda: driver.put(root, 0),
        "root entry reserved": lambda: driver.put(root, driver.get(root) | 1 << 5),
        "root entry leads nowhere": lambda: driver.put(root, NOWHERE | 1),
        "context entry absent": lambda: driver.put(context, context_word & ~1),
        "context entry reserved": lambda: driver.put(context, context_word | 1 << 6),
        "context entry reserved in its last word": lambda: driver.put(context + 24, 1),
        "context entry without DTE": lambda: driver.put(context, context_word & ~4),
        "context entry leads nowhere": lambda: driver.put(context, NOWHERE | context_word & 0xFFF),
        "RID_PASID beyond the directory": lambda: driver.put(context + 8, 1 << 13),
        "RID_PASID without a directory entry": lambda: driver.put(context + 8, 1 << 6),
        "directory entry absent": lambda: driver.put(directory, table),
        "directory entry reserved": lambda: driver.put(directory, table | 1 | 1 << 4),
        "directory entry leads nowhere": lambda: driver.put(directory, NOWHERE | 1),
        "RID_PASID without an entry": lambda: driver.put(context + 8, 5),
        "PASID entry absent": lambda: driver.put(table, driver.get(table) & ~1),
        "PASID entry reserved": lambda: driver.put(table + 56, 1 << 63),
        "tables at the end of the address space": lambda: driver.put(directory, (1 << 64) - 4096 | 1),
    }[what]()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("root entry absent", SRT_2),
        ("root entry reserved", SRT_3),
        ("root entry leads nowhere", SCT_1),
        ("context entry absent", SCT_2),
        ("context entry reserved", SCT_3),
        ("context entry reserved in its last word", SCT_3),
        ("context entry without DTE", SCT_5),
        ("context entry leads nowhere", SPD_1),
        ("RID_PASID beyond the directory", SCT_9),
        ("RID_PASID without a directory entry", SPD_2),
        ("directory entry absent", SPD_2),
        ("directory entry reserved", SPD_3),
        ("directory entry leads nowhere", SPT_1),
        ("RID_PASID without an entry", SPT_2),
        ("PASID entry absent", SPT_2),
        ("PASID entry reserved", SPT_3),
        ("tables at the end of the address space", SPT_1),
    ],
)
def test_each_level_refuses_with_a_reason_of_its_own(silicon: Silicon, what: str, reason: int) -> None:
    spoiled(silicon, what)
    assert asks(silicon) == reason
    assert [record.reason for record in silicon.faults()] == [reason]
    assert silicon.unit.pasid_entry(OTHER) == b""


def restart(silicon: Silicon, rtaddr: int) -> None:
    """Translation is switched on again, from there."""
    driver = silicon.driver
    driver.store(RTADDR, rtaddr)
    for command in (QIE, QIE | SRTP, QIE | TE):
        driver.store(GCMD, command)
        silicon.unit.kick()


@pytest.mark.parametrize(
    ("rtaddr", "reason"),
    [
        (NOWHERE | 1 << 10, SRT_1),
        ((1 << 64) - 4096 | 1 << 10, SRT_1),
        (FRAMES | 1 << 10, SRT_1),
        (0x4100_0000, RTA_4),
        (0x4100_0000 | 2 << 10, RTA_4),
        (0x4100_0000 | 3 << 10, RTA_4),
        (0x4100_0000 | 1 << 10, 0),
    ],
)
def test_the_root_table_is_where_rtaddr_says_in_scalable_mode_only(
    silicon: Silicon, rtaddr: int, reason: int
) -> None:
    assert asks(silicon) == 0
    restart(silicon, rtaddr)
    assert asks(silicon) == reason


def test_with_translation_off_nothing_is_translated_and_with_it_on_again_everything(silicon: Silicon) -> None:
    assert asks(silicon) == 0
    silicon.driver.store(GCMD, QIE)
    silicon.unit.kick()
    assert asks(silicon) == SPT_2
    silicon.driver.store(GCMD, QIE | TE)
    silicon.unit.kick()
    assert asks(silicon) == 0


# -- FPD -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["context", "directory", "PASID entry"])
def test_fpd_of_any_entry_on_the_way_hides_what_it_qualifies(silicon: Silicon, level: str) -> None:
    driver = silicon.driver
    directory = driver.directory(RID)
    table = driver.get(directory) & ~0xFFF
    at = {"context": driver.context_entry(RID), "directory": directory, "PASID entry": table}[level]
    driver.put(at, driver.get(at) | 2)
    driver.put(table, driver.get(table) & ~1)
    assert asks(silicon) == SPT_2
    assert silicon.faults() == []


@pytest.mark.parametrize(
    ("level", "reserved", "reason"),
    [("context", 1 << 6, SCT_3), ("directory", 1 << 4, SPD_3), ("PASID entry", 1 << 10, SPT_3)],
)
def test_fpd_hides_a_reserved_bit_of_its_own_entry(
    silicon: Silicon, level: str, reserved: int, reason: int
) -> None:
    driver = silicon.driver
    directory = driver.directory(RID)
    table = driver.get(directory) & ~0xFFF
    at = {"context": driver.context_entry(RID), "directory": directory, "PASID entry": table}[level]
    driver.put(at, driver.get(at) | reserved | 2)
    assert asks(silicon) == reason
    assert silicon.faults() == []


def test_nothing_in_a_root_entry_hides_its_reserved_bits(silicon: Silicon) -> None:
    root = silicon.driver.root_entry(RID)
    silicon.driver.put(root, silicon.driver.get(root) | 2)
    assert asks(silicon) == SRT_3
    assert [record.reason for record in silicon.faults()] == [SRT_3]


# -- caches --------------------------------------------------------------------------------------------


def test_a_context_entry_is_cached_until_it_is_invalidated(silicon: Silicon) -> None:
    assert asks(silicon) == 0
    silicon.driver.put(silicon.driver.context_entry(RID), 0)
    assert asks(silicon) == 0
    silicon.execute(context_cache(1))
    assert asks(silicon) == SCT_2


@pytest.mark.parametrize(
    ("raw", "forgets"),
    [
        (context_cache(1), {RID, OTHER}),
        (context_cache(2, did=DID), {RID, OTHER}),
        (context_cache(3, sid=RID), {RID}),
        (context_cache(3, sid=OTHER), {OTHER}),
        (context_cache(3, sid=RID | 7, fm=3), {RID}),
        (context_cache(3, sid=RID | 7, fm=0), set()),
        (context_cache(3, sid=RID | 6, fm=2), {RID}),
        (context_cache(3, sid=RID | 4, fm=1), {RID}),
        (pasid_cache(DID), set()),
        (iotlb_global(), set()),
    ],
)
def test_context_invalidations_reach_the_functions_they_name(
    silicon: Silicon, raw: bytes, forgets: set[int]
) -> None:
    silicon.write_pasid_entry(OTHER, pasid_entry(TABLES))
    for rid in (RID, OTHER):
        assert asks(silicon, rid) == 0
        silicon.driver.put(silicon.driver.context_entry(rid), 0)
    silicon.execute(raw)
    assert {rid for rid in (RID, OTHER) if asks(silicon, rid) == SCT_2} == forgets


@pytest.mark.parametrize(
    ("raw", "forgets"),
    [
        (pasid_cache_of(3, 0), {RID, OTHER}),
        (pasid_cache_of(0, DID), {RID}),
        (pasid_cache_of(1, DID, 0), {RID}),
        (pasid_cache_of(1, DID, 1), set()),
        (pasid_cache_of(0, DID + 1), {OTHER}),
        (pasid_cache_of(1, DID + 2, 0), set()),
        (context_cache(1), set()),
    ],
)
def test_pasid_invalidations_reach_the_domain_and_the_pasid_they_name(
    silicon: Silicon, raw: bytes, forgets: set[int]
) -> None:
    silicon.write_pasid_entry(OTHER, pasid_entry(TABLES, did=DID + 1))
    for rid in (RID, OTHER):
        assert asks(silicon, rid) == 0
        silicon.write_pasid_entry(rid, bytes(64))
    silicon.execute(raw)
    assert {rid for rid in (RID, OTHER) if asks(silicon, rid) == SPT_2} == forgets


@pytest.mark.parametrize("what", ["root entry absent", "context entry absent", "PASID entry absent"])
def test_what_is_not_present_is_not_cached(silicon: Silicon, what: str) -> None:
    before = bytes(silicon.driver.structures)
    spoiled(silicon, what)
    assert asks(silicon) != 0
    silicon.driver.structures[:] = before
    assert asks(silicon) == 0, "caching mode is off: no invalidation is due"


def test_srtp_forgets_everything_that_was_cached(silicon: Silicon) -> None:
    assert asks(silicon) == 0
    silicon.write_pasid_entry(RID, bytes(64))
    silicon.tables.unmap(7)
    silicon.driver.store(GCMD, QIE | TE | SRTP)
    silicon.unit.kick()
    assert asks(silicon) == SPT_2
    assert silicon.unit.iotlb.entries(DID) == []


# -- entries half written ------------------------------------------------------------------------------


def test_an_entry_of_which_only_the_last_words_are_stored_is_not_there(silicon: Silicon) -> None:
    """The driver dies, or is overtaken, between two of its eight stores: word 0 with P is the last."""
    table = silicon.driver.get(silicon.driver.directory(RID)) & ~0xFFF
    raw = pasid_entry(TABLES, did=DID + 1)
    silicon.write_pasid_entry(RID, bytes(64))
    for word in reversed(range(1, 8)):
        silicon.driver.put(table + 8 * word, int.from_bytes(raw[8 * word : 8 * word + 8], "little"))
        assert asks(silicon) == SPT_2
    silicon.driver.put(table, int.from_bytes(raw[:8], "little"))
    assert asks(silicon) == 0
    assert [page for page, _ in silicon.unit.iotlb.entries(DID + 1)] == [7]


def test_a_context_entry_goes_with_p_first_and_the_rest_after_the_invalidation(silicon: Silicon) -> None:
    assert asks(silicon) == 0
    driver, context = silicon.driver, silicon.driver.context_entry(RID)
    word = driver.get(context)
    driver.put(context, word & ~1)
    assert asks(silicon) == 0, "still cached, and still whole"
    silicon.execute(context_cache(3, sid=RID) + pasid_cache_of(3, 0) + iotlb_global())
    for n in range(4):
        assert asks(silicon) == SCT_2
        driver.put(context + 8 * n, 0)
    assert asks(silicon) == SCT_2


def test_a_function_of_the_upper_half_of_its_bus_is_found_by_the_upper_table(silicon: Silicon) -> None:
    above = 0x6AF8
    silicon.write_pasid_entry(above, pasid_entry(TABLES))
    assert asks(silicon, above) == 0
    silicon.driver.put(silicon.driver.root_entry(RID), 0)
    assert asks(silicon, above) == 0
    silicon.execute(context_cache(1))
    assert (asks(silicon, above), asks(silicon, RID)) == (0, SRT_2)


# -- page requests -------------------------------------------------------------------------------------


def asks_for_a_page(silicon: Silicon) -> ResponseCode | None:
    """Page 9, absent; the answer that came without the driver."""
    answered = silicon.start(silicon.function.pri.request([PageAccess(IovaPfn(9), True)]))
    return answered.result() if answered.done else None


@pytest.mark.parametrize(("gone", "reason"), [(1 << 4, SCT_8), (1 << 0, SCT_2)])
def test_a_page_request_without_pre_is_a_fault_and_response_failure(
    silicon: Silicon, gone: int, reason: int
) -> None:
    """[VT-d 7.4]: nothing reaches the queue; the function's page requests are off, as PCIe has it."""
    context = silicon.driver.context_entry(RID)
    silicon.driver.put(context, silicon.driver.get(context) & ~gone)
    assert asks_for_a_page(silicon) is ResponseCode.FAILURE
    (raw,) = silicon.driver.take_faults()
    assert fault_record(raw) == (reason, 9, RID, True)
    assert (raw[15] >> 6 & 1, raw[11] >> 4 & 1) == (0, 1), "T1, T2: a page request"
    assert silicon.requests() == []
    assert not silicon.function.pri.enabled


def test_pre_is_cached_with_the_rest_of_its_context_entry(silicon: Silicon) -> None:
    assert asks(silicon) == 0
    context = silicon.driver.context_entry(RID)
    silicon.driver.put(context, silicon.driver.get(context) & ~(1 << 4))
    assert asks_for_a_page(silicon) is None
    assert [asked.page for asked in silicon.serve()] == [9]
    silicon.execute(context_cache(3, sid=RID))
    assert asks_for_a_page(silicon) is ResponseCode.FAILURE
    assert silicon.requests() == []


def test_fpd_hides_a_page_request_without_pre(silicon: Silicon) -> None:
    context = silicon.driver.context_entry(RID)
    silicon.driver.put(context, silicon.driver.get(context) & ~(1 << 4) | 1 << 1)
    assert asks_for_a_page(silicon) is ResponseCode.FAILURE
    assert silicon.faults() == []
