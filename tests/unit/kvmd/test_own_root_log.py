"""Dirty logging beside a root of the IOMMU's own: it stays writable, so what it lets a device write counts as
dirty, always; CPUs are logged as ever.  No page that a device wrote is missing, and no importer is told.
"""

from __future__ import annotations

import pytest

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.export.tdp_fd import CreateTdpFd
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.reclaim import migrate
from kvmd.core.slots.dirty_log import ClearDirtyLog
from kvmd.core.tables.flush import Flusher
from protocol.errors import UapiError
from protocol.units import MIB, Hva
from tests.kit.kvmd import BITMAP, READ, World
from tests.planted.plugin import Plants
from tests.unit.kvmd.logged import NO_PML
from tests.unit.kvmd.own_root import BASE, PAGE, PAGES, Managed


@pytest.fixture(params=[CpuFeatures(), NO_PML], ids=["pml", "wp"])
def guest(request: pytest.FixtureRequest) -> Managed:
    return Managed(features=request.param)


def test_what_a_device_can_write_is_dirty_in_every_round_and_nobody_is_told(guest: Managed) -> None:
    guest.write(0, 1)
    guest.fault(2)
    before = [guest.entry(page) for page in range(3)]
    guest.log()
    for _ in range(3):
        assert guest.dirty() == {0, 1, 2}
        assert guest.sound()
    assert [guest.entry(page) for page in range(3)] == before
    assert [guest.fault(page) for page in range(3)] == [FaultResult.SPURIOUS] * 3, "no write right was taken"
    assert guest.heard == 0


def test_what_a_device_can_only_read_is_dirty_when_a_cpu_wrote_it(guest: Managed) -> None:
    guest.log()
    guest.fault(7, READ)  # the zero page
    assert guest.dirty() == set()
    guest.write(7)
    assert guest.dirty() == {7}


def test_a_page_faulted_in_while_the_slot_logs_is_dirty_from_then_on(guest: Managed) -> None:
    guest.log()
    assert guest.dirty() == set()
    guest.write(3)
    guest.fault(4)
    assert guest.dirty() == {3, 4}
    assert guest.dirty() == {3, 4}
    assert guest.sound()


def test_a_page_that_is_taken_away_is_told_once_more(guest: Managed) -> None:
    """A device may have written it until then."""
    guest.fault(3)
    guest.log()
    guest.dirty()
    guest.do(migrate(guest.mm, Hva(guest.hva + 3 * PAGE), PAGE))
    assert guest.dirty() == {3}
    assert guest.dirty() == set()
    assert guest.sound()


def test_bits_go_to_user_space_only_after_what_went_before_is_acked(guest: Managed) -> None:
    """A device writes through its old translation until the importer acks; the bit that is taken covers that,
    so it must not be told before."""
    guest.fault(3)
    guest.log()
    gone = guest.start(migrate(guest.mm, Hva(guest.hva + 3 * PAGE), PAGE))
    got = guest.start(guest.vm.dirty_log.get(0, Hva(BITMAP)))
    assert (gone.done, got.done) == (False, False)
    guest.settle(gone)
    assert got.done


def test_a_get_that_does_not_wait_is_noticed(guest: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits_for_nobody(self: Flusher, span: object) -> None:
        self.epoch += 1

    guest.fault(3)
    guest.log()
    guest.start(migrate(guest.mm, Hva(guest.hva + 3 * PAGE), PAGE))
    monkeypatch.setattr(Flusher, "flush", waits_for_nobody)
    assert guest.start(guest.vm.dirty_log.get(0, Hva(BITMAP))).done


@pytest.mark.parametrize("manual", [1, 3])
def test_a_cleared_page_that_a_device_can_write_is_dirty_again_at_once(manual: int) -> None:
    guest = Managed(features=NO_PML)
    enable_cap(guest.vm, KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, [manual])
    guest.write(0)
    guest.fault(1)
    guest.log()
    guest.do(guest.mm.write(Hva(BITMAP), b"\xff" * (PAGES // 8)))
    guest.do(guest.vm.dirty_log.clear(ClearDirtyLog(0, PAGES, 0, Hva(BITMAP))))
    assert guest.dirty() == {0, 1}
    assert (guest.cpu, guest.iommu) == ({0: False, 1: False}, {0: True, 1: True})
    assert guest.heard == 0
    assert guest.sound()


def test_logging_splits_what_cpus_have_and_leaves_a_device_its_huge_leaf() -> None:
    """All of it counts as dirty; the slot's other huge pages do not."""
    guest = Managed(level=2, pages=4 * 512, features=NO_PML, tables=8 * MIB)
    guest.fault(5)
    guest.log()
    assert (guest.cpu_root.leaves, guest.exported.root.leaves) == ([0, 512, 0, 0], [0, 0, 1, 0])
    assert guest.dirty() == set(range(512))
    guest.write(512 + 9)
    assert guest.exported.root.leaves == [0, 0, 2, 0]
    assert guest.dirty() == set(range(1024))
    guest.log(0)
    guest.write(5)
    assert guest.cpu_root.leaves[2] == 1, "CPUs' leaves are huge again"
    assert (guest.exported.root.leaves, guest.heard) == ([0, 0, 2, 0], 0)
    assert guest.sound()


def test_a_vcpu_logs_into_its_ring_and_a_devices_pages_are_told_by_the_bitmap() -> None:
    world = World(NO_PML, tables=8 * MIB)
    for cap, arg in (
        (KvmCap.DIRTY_LOG_RING, 1 << 16),
        (KvmCap.DIRTY_LOG_RING_WITH_BITMAP, 0),
        (KvmCap.TDP_FD_OWN_ROOT, 0),
    ):
        enable_cap(world.vm, cap, 0, [arg])
    world.map(1, hva=BITMAP)
    world.set_slot(0, BASE, 64, world.map(64), 1)
    vcpu = world.create_vcpu()
    ring = memoryview(bytearray(1 << 16))
    world.vm.dirty_log.add_ring(0, ring)
    exported = world.export()
    world.guest_write(vcpu, BASE << 12, b"x")
    world.io_fault(exported, BASE + 1)
    for _ in range(2):
        world.run(world.vm.dirty_log.get(0, Hva(BITMAP)))
        assert world.run(world.mm.read(Hva(BITMAP), 8)) == b"\3".ljust(8, b"\0")
    assert int.from_bytes(ring[:4], "little") == 1, "the vCPU's store is in its ring"
    assert check_vm(world.vm) == []


def test_rings_without_bitmaps_cannot_log_a_devices_stores_here_either() -> None:
    world = World(NO_PML)
    for cap, arg in ((KvmCap.DIRTY_LOG_RING, 1 << 16), (KvmCap.TDP_FD_OWN_ROOT, 0)):
        enable_cap(world.vm, cap, 0, [arg])
    world.create_vcpu()
    with pytest.raises(UapiError, match="without bitmaps"):
        world.run(world.vm.exports.create(CreateTdpFd(0, 0, 0)))


def test_a_log_that_forgets_what_devices_can_write_is_noticed(guest: Managed, plant: Plants) -> None:
    """I20 finds it without a device having written."""
    guest.fault(2)
    guest.log()
    plant("R19-unnoticed-not-dirty")
    guest.dirty()
    assert {sentence[:3] for sentence in check_vm(guest.vm)} == {"I20"}


def test_cpus_are_logged_by_their_dirty_bits_beside_a_root_of_the_iommus_own() -> None:
    """Under a shared root D tells nothing (B-35); here CPUs walk another."""
    writable = {}
    for own in (True, False):
        guest = Managed(own=own)
        guest.write(0)
        guest.log()
        writable[own] = guest.cpu[0]
        guest.write(0)
        assert guest.stats()["pf_fast"] == (not own)
        assert 0 in guest.dirty()
    assert writable == {True: True, False: False}
