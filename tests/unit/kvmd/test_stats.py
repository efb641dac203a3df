"""Counters against a count kept by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import msgpack
import pytest

from kvmd.core.mm.madvise import dontneed
from kvmd.core.stats import vm_stats
from kvmd.service import door
from kvmd.service.objects import App
from protocol.rpc.channel import Fds
from protocol.rpc.session import MAX_BODY_BYTES
from protocol.uapi.kvm import StatsOfAll
from protocol.uapi.message import MAX_TOLD
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World


def test_the_counters_tell_who_faulted_and_how_it_ended() -> None:
    world = World()
    hva = world.map(16)
    world.set_slot(0, 0x100, 16, hva)
    world.set_slot(1, 0x200, 512, world.map(1, 2))
    vcpu, exported, importer = world.create_vcpu(), world.export(), SlowImporter()
    world.guest_write(vcpu, 0x10_0000, b"x" * 3 * 4096)  # three faults, fixed
    world.guest_read(vcpu, 0x50_0000, 1)  # emulated: no slot
    world.io_fault(exported, 0x100)  # spurious
    world.io_fault(exported, 0x103)  # fixed
    world.io_fault(exported, 0x200)  # fixed, 2 MiB
    world.io_fault(exported, 0x900)  # fails
    exported.register_importer("unit", importer)
    world.start(dontneed(world.mm, hva, 4096))
    world.ack(importer)
    assert vm_stats(world.vm) == {
        "vm": 1,
        "vcpus": 1,
        "exported_tdps": 1,
        "vcpus_apart": 0,
        "noncoherent_dma": 0,
        "importers": 1,
        "ept_violations": 4,
        "fault_retries": 0,
        "notes": 0,
        "notes_dropped": 0,
        "remote_tlb_flush": 1,
        "pf_mmio_spte_created": 1,
        "tlb_flush": 1,
        "memslot_generation": 2,
        "pages_4k": 3,
        "pages_2m": 1,
        "pages_1g": 0,
        "pinned_pages": 0,
        "table_pages": 5,
        "table_pages_held": 0,
        "splits": 0,
        "collapses": 0,
        "table_pages.shared.1": 2,  # the second holds the MMIO entry
        "table_pages.shared.2": 1,
        "table_pages.shared.3": 1,
        "table_pages.shared.4": 1,
        "pf_taken": 4,
        "pf_fixed": 3,
        "pf_fast": 0,
        "pf_spurious": 0,
        "pf_major": 0,
        "pf_allocated": 3,
        "pf_emulate": 1,
        "pf_failed": 0,
        "io_pf_taken": 4,
        "io_pf_fixed": 2,
        "io_pf_fast": 0,
        "io_pf_spurious": 1,
        "io_pf_major": 0,
        "io_pf_allocated": 1 + 512,
        "io_pf_failed": 1,
    }


def test_as_many_vms_as_one_answer_tells_of_fit_into_it() -> None:
    """9,600 did not: the administrator's STATS was a bug of ours."""
    largest = dict.fromkeys(vm_stats(World().vm), (1 << 64) - 1)
    assert MAX_TOLD * len(msgpack.packb(largest)) < MAX_BODY_BYTES // 2


def test_the_administrator_is_told_of_all_vms_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_TOLD", 2)
    host, vms = World().host, [World().vm for _ in range(5)]
    for number, vm in enumerate(vms, 3):
        vm.id = number
    app = cast(App, SimpleNamespace(vms=vms, mms={}, host=host))
    pages = [door._stats_of_all(app, StatsOfAll(op="STATS", after=after), Fds()) for after in (0, 4, 6, 7)]
    assert [[vm["vm"] for vm in page["vms"]] for page in pages] == [[3, 4], [5, 6], [7], []]
    assert {page["vm_count"] for page in pages} == {5}
