"""Dirty rings of a VM, and the capabilities that switch logging's ways."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.capability import KvmCap, check_extension, enable_cap
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from protocol.errors import UapiError
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.units import Gfn
from tests.kit.kvmd import World
from tests.unit.kvmd.logged import GFN, NO_PML, Logged, refusal_of


@pytest.mark.defect("B-34")
def test_with_rings_a_devices_mark_is_in_the_bitmap() -> None:
    """B-34: no vCPU runs when a device's fault is handled, so there is no ring to push to."""
    logged = Logged(ring=4096)
    exported = logged.export()
    logged.write(4)
    assert logged.io_fault(exported, GFN + 8) is FaultResult.FIXED
    assert logged.dirty() == {8}
    assert logged.ring.cast("I")[:4].tolist() == [1, 0, 4, 0]
    assert logged.ring.cast("I")[4] == 0


@pytest.mark.defect("B-34")
def test_a_vm_that_logs_into_rings_alone_cannot_be_exported() -> None:
    logged = Logged(ring=4096, bitmap=False)
    with pytest.raises(UapiError) as caught:
        logged.export()
    assert caught.value.errno == errno.EINVAL
    assert logged.vm.exports.tdps == {}
    assert refusal_of(logged.get(), logged) == errno.ENXIO


@pytest.mark.parametrize("features", [NO_PML, CpuFeatures()], ids=["write protection", "PML"])
def test_a_full_ring_stops_the_vcpu_until_it_is_reset(features: CpuFeatures) -> None:
    logged = Logged(features, ring=16384 if features.pml else 4096, pages=1024)
    limit = len(logged.ring) // 16 - (576 if features.pml else 64)
    logged.write(*range(limit - 1))
    result = logged.guest_write(logged.vcpu, GFN + limit << 12, b"x")
    assert (result.exit.reason, result.finished) == (ExitReason.DIRTY_RING_FULL, 0)
    assert logged.guest_read(logged.vcpu, GFN << 12, 1).exit.reason is ExitReason.DIRTY_RING_FULL
    words = logged.ring.cast("I")
    for index in range(limit):
        words[index * 4] = 2
    assert logged.run(logged.vm.dirty_log.reset_rings()) == limit
    logged.write(limit)
    logged.write(0)
    assert words[limit * 4 : limit * 4 + 3].tolist() == [1, 0, limit]
    assert words[limit * 4 + 4 : limit * 4 + 7].tolist() == [1, 0, 0], "protected again by the reset"


def test_what_finds_its_ring_full_to_the_last_entry_is_in_the_bitmap() -> None:
    """KVM stores for user space, whom no full ring keeps from asking."""
    logged = Logged(ring=4096)
    log, slot = logged.vm.dirty_log, logged.vm.slots.find(Gfn(GFN), 0)
    assert slot is not None
    for page in [*range(64)] * 4:
        log.mark(slot, Gfn(GFN + page), logged.vcpu.arch.id)
    assert logged.dirty() == set()
    log.mark(slot, Gfn(GFN + 100), logged.vcpu.arch.id)
    assert logged.dirty() == {100}


def test_a_reset_waits_for_the_acks() -> None:
    logged = Logged(ring=4096, export=True)
    logged.write(4)
    assert logged.start(logged.vm.dirty_log.reset_rings()).result() == 0
    logged.ring.cast("I")[0] = 2
    wait = logged.start(logged.vm.dirty_log.reset_rings())
    assert not wait.done
    assert not logged.entry(4) & bits.WRITE
    logged.ack(logged.importer)
    assert wait.result() == 1


def test_a_scribbled_entry_protects_nothing_and_harms_nobody() -> None:
    logged = Logged(ring=4096)
    logged.write(1, 2, 3)
    words = logged.ring.cast("I")
    for index, (slot, low, high) in enumerate(((0xFFFF_FFFF, 0, 0), (7, 1, 0), (0, 0, 0xFFFF_FFFF))):
        words[index * 4 : index * 4 + 4] = memoryview(
            b"".join(word.to_bytes(4, "little") for word in (2, slot, low, high))
        ).cast("I")
    assert logged.run(logged.vm.dirty_log.reset_rings()) == 3
    assert all(logged.entry(page) & bits.WRITE for page in (1, 2, 3))


def test_an_entry_of_what_the_slot_was_takes_no_protection_from_its_neighbours() -> None:
    """The slot was larger, and went before its ring was harvested."""
    logged = Logged(ring=4096, pages=512)
    logged.write(400)
    logged.set_slot(0, GFN, 0, 0)
    logged.pages = 128
    logged.log(1)
    logged.write(10)
    words = logged.ring.cast("I")
    assert (words[2], words[6]) == (400, 10)
    words[0] = words[4] = 2
    assert logged.run(logged.vm.dirty_log.reset_rings()) == 2
    logged.dirty()
    assert not logged.entry(10) & bits.WRITE
    logged.write(10)
    assert words[8:11].tolist() == [1, 0, 10]
    assert check_vm(logged.vm) == []


def test_rings_need_their_capability() -> None:
    logged = Logged()
    assert refusal_of(logged.vm.dirty_log.reset_rings(), logged) == errno.EINVAL


# -- capabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "flags", "arg", "number"),
    [
        (KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, 3, 0),
        (KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, 2, errno.EINVAL),
        (KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 1, 1, errno.EINVAL),
        (KvmCap.DIRTY_LOG_RING, 0, 0, errno.EINVAL),
        (KvmCap.DIRTY_LOG_RING, 0, 2048, errno.EINVAL),
        (KvmCap.DIRTY_LOG_RING, 0, 6144, errno.EINVAL),
        (KvmCap.DIRTY_LOG_RING, 0, 4096, 0),
        (KvmCap.DIRTY_LOG_RING_ACQ_REL, 0, (1 << 32) + 4096, 0),
        (KvmCap.DIRTY_LOG_RING, 0, 1 << 21, errno.E2BIG),
        (KvmCap.DIRTY_LOG_RING_WITH_BITMAP, 0, 0, errno.EINVAL),  # no ring yet
        (KvmCap.NR_MEMSLOTS, 0, 0, errno.EINVAL),
        (9999, 0, 0, errno.EINVAL),
    ],
)
def test_a_capability_is_enabled_or_refused(cap: int, flags: int, arg: int, number: int) -> None:
    vm = World(NO_PML).vm
    if number:
        with pytest.raises(UapiError) as caught:
            enable_cap(vm, cap, flags, [arg])
        assert caught.value.errno == number
    else:
        enable_cap(vm, cap, flags, [arg])


def test_a_ring_must_hold_what_pml_may_log_at_once() -> None:
    with pytest.raises(UapiError, match=r"at least 0x2400"):
        enable_cap(World().vm, KvmCap.DIRTY_LOG_RING, 0, [8192])


def test_an_unknown_capability_is_absent() -> None:
    assert check_extension(CpuFeatures(), World().vm, 9999) == 0
