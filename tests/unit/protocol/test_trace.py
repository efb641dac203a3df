"""Tracepoints: their names and printed forms, literally; off they cost nothing and write nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count

import pytest

from protocol.trace import (
    TRACE,
    AttachDeviceToDomain,
    Event,
    HandleMmioPageFault,
    KvmDirtyRingExit,
    KvmDirtyRingPush,
    KvmMmuSetSpte,
    KvmMmuSplitHugePage,
    KvmMmuSpteRequested,
    KvmPageFault,
    KvmTdpMmuSpteChanged,
    KvmUnmapHvaRange,
    MarkMmioSpte,
    PrqReport,
    QiSubmit,
)
from tests.tidy.source import product


@pytest.fixture
def lines() -> Iterator[list[str]]:
    written: list[str] = []
    TRACE.start(written.append)
    yield written
    TRACE.stop()


PRINTED: list[tuple[Event, str]] = [
    (
        KvmPageFault(2, 0, 0x12345000, 0x18A),
        "kvm_page_fault: vcpu 2 rip 0x0 address 0x0000000012345000 error_code 0x18a",
    ),
    (
        KvmMmuSetSpte(0x1234, 0x0E00000100007377, 1, 0x103040),
        "kvm_mmu_set_spte: gfn 1234 spte e00000100007377 (rwx) level 1 at 103040",
    ),
    (
        KvmMmuSetSpte(0x1234, 0x0800000100007375, 2, 0x103040),
        "kvm_mmu_set_spte: gfn 1234 spte 800000100007375 (r-x) level 2 at 103040",
    ),
    (
        KvmTdpMmuSpteChanged(0, 0xABC, 1, 0x0E00000100007377, 0),
        "kvm_tdp_mmu_spte_changed: as id 0 gfn abc level 1 old_spte e00000100007377 new_spte 0",
    ),
    (
        KvmMmuSplitHugePage(0x200, 0x83F7, 2, 0),
        "kvm_mmu_split_huge_page: gfn 200 spte 83f7 level 2 errno 0",
    ),
    (
        KvmUnmapHvaRange(0x1000_0000_0000, 0x1000_0000_1000),
        "kvm_unmap_hva_range: mmu notifier unmap range: 0x00100000000000 -- 0x00100000001000",
    ),
    (
        KvmUnmapHvaRange(0, 1 << 47),
        "kvm_unmap_hva_range: mmu notifier unmap range: 0000000000000000 -- 0x00800000000000",
    ),
    (KvmMmuSpteRequested(0x10, 0x100007, 1), "kvm_mmu_spte_requested: gfn 10 pfn 100007 level 1"),
    (
        MarkMmioSpte(0x103040, 0xFEE00, 3, 0x11),
        "mark_mmio_spte: sptep:103040 gfn fee00 access 3 gen 11",
    ),
    (HandleMmioPageFault(0xFEE00123, 0xFEE00, 2), "handle_mmio_page_fault: addr:fee00123 gfn fee00 access 2"),
    (
        KvmDirtyRingPush(0, 0x11, 0x10, 65537, 0x40, 1),
        "kvm_dirty_ring_push: ring 0: dirty 0x11 reset 0x10 slot 65537 offset 0x40 (used 1)",
    ),
    (KvmDirtyRingExit(3), "kvm_dirty_ring_exit: vcpu 3"),
    (AttachDeviceToDomain("0000:6a:01.0"), "attach_device_to_domain: IOMMU: device=0000:6a:01.0"),
    (
        QiSubmit.of(struct.pack("<4Q", 2 | 3 << 4 | 5 << 16, 0x1000, 0, 0)),
        "qi_submit: iotlb_inv dmar0: 0x50032 0x1000 0x0 0x0",
    ),
    (QiSubmit((9, 8, 0, 0)), "qi_submit: page_grp_resp dmar0: 0x9 0x8 0x0 0x0"),
    (QiSubmit((0xF, 0, 0, 0)), "qi_submit: 0xf dmar0: 0xf 0x0 0x0 0x0"),
    (
        PrqReport((1 | 0x6A08 << 16, 0x12345000 | 3 << 3 | 7, 0, 0), 4),
        "prq_report: dmar0/0000:6a:01.0 seq# 4: rid=0x6a08 addr=0x12345 rw--l pasid=0x0 index=0x3",
    ),
    (
        PrqReport((1 | 1 << 9 | 0x6A09 << 16 | 0x55 << 32 | 3 << 52, 0x1000 | 2, 0xAA, 0xBB), 0),
        (
            "prq_report: dmar0/0000:6a:01.1 seq# 0: rid=0x6a09 addr=0x1 -wxp- pasid=0x55 index=0x0"
            " private=0xaa/0xbb"
        ),
    ),
]


@pytest.mark.parametrize(("event", "line"), PRINTED, ids=lambda value: str(value)[:40])
def test_an_event_is_printed_as_the_kernel_prints_it(event: Event, line: str, lines: list[str]) -> None:
    TRACE.emit(event)
    assert lines == [line]


def test_every_event_there_is_has_its_form_held_here() -> None:
    assert set(Event.__subclasses__()) >= {type(event) for event, _ in PRINTED}
    assert {event.NAME for event in Event.__subclasses__()} == {event.NAME for event, _ in PRINTED}


def test_every_event_there_is_has_its_tracepoint() -> None:
    used = "".join(module.text for module in product() if module.name != "protocol.trace")
    assert [event for event in Event.__subclasses__() if event.__name__ not in used] == []


def test_page_requests_are_numbered_by_their_unit() -> None:
    entry, one, other = struct.pack("<4Q", 1, 0, 0, 0), count(), count()
    assert [event.seq for event in PrqReport.of_queue(entry * 2, one)] == [0, 1]
    assert [event.seq for event in PrqReport.of_queue(entry, other)] == [0]
    assert [event.seq for event in PrqReport.of_queue(entry, one)] == [2]


def test_a_trace_that_is_stopped_is_off(lines: list[str]) -> None:
    assert TRACE.on
    TRACE.stop()
    assert not TRACE.on
