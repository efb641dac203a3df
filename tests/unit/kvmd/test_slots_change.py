"""What a change of the memslots does to what is mapped: who is zapped, who is told, and how often."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from kvmd.core.capability import KvmCap, check_extension
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.slots import slots_change
from kvmd.core.slots.memslot import MemoryRegion, Memslots
from kvmd.core.vm import Kvm, VmType
from protocol.errors import UapiError
from protocol.units import Gfn, Gpa, Hva
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World

HVA = Hva(0x2000_0000_0000)


def lent(features: CpuFeatures | None = None) -> tuple[World, SlowImporter]:
    """Two slots of 16 pages, the first page of each mapped by a device."""
    world = World(features)
    world.map(32, hva=HVA)
    world.set_slot(0, 0x100, 16, HVA)
    world.set_slot(1, 0x200, 16, HVA + 0x1_0000)
    exported = world.lend()
    for gfn in (0x100, 0x200):
        assert world.io_fault(exported, gfn) is FaultResult.FIXED
    return world, world.importer


@pytest.mark.rfc("RFC-95")
@pytest.mark.parametrize("gfn", [0, 0x300], ids=["delete", "move"])
def test_an_exported_root_loses_all_leaves_in_one_flush_and_stays(gfn: int) -> None:
    world, importer = lent()
    root = world.vm.exports.tdps[0].root
    before = (root.hpa, root.role, root.tables)
    region = world.region(0, gfn, 16 if gfn else 0, HVA if gfn else 0)
    wait = world.start(world.vm.slots_change.set_memory_region(region))
    assert world.table(root.hpa) == {}, "of the other slot too"
    assert importer.heard == [(0, (1 << 64) - 1, world.vm.flusher.epoch)]
    assert not wait.done
    world.ack(importer)
    assert wait.done
    assert ((root.hpa, root.role, root.tables), root.invalid) == (before, False)
    assert len(importer.heard) == 1


@pytest.mark.rfc("RFC-96")
def test_other_roots_become_invalid_and_are_built_anew() -> None:
    """System-management mode has a root of its own, which nobody lends."""
    world, importer = lent()
    vcpu = world.vm.vcpus[0]
    old = vcpu.arch.load_root(1)
    assert old is not world.vm.exports.tdps[0].root
    wait = world.start(world.vm.slots_change.set_memory_region(world.region(1, 0, 0, 0)))
    world.ack(importer)
    assert wait.done
    assert old.invalid
    assert vcpu.arch.load_root(1) is not old
    assert vcpu.arch.load_root() is world.vm.exports.tdps[0].root
    assert check_vm(world.vm) == []


def test_creating_a_slot_zaps_nothing_and_tells_nobody() -> None:
    world, importer = lent()
    before = world.table(world.vm.exports.tdps[0].root.hpa)
    world.set_slot(2, 0x900, 16, HVA)
    world.set_slot(0, 0x100, 16, HVA)  # no change at all
    assert world.table(world.vm.exports.tdps[0].root.hpa) == before
    assert importer.heard == []


def test_switching_logging_zaps_nothing() -> None:
    world, _ = lent()
    root = world.vm.exports.tdps[0].root.hpa
    before = world.table(root)
    for flags in (1, 0):
        world.do(world.vm.slots_change.set_memory_region(world.region(0, 0x100, 16, HVA, flags)))
    assert {gfn: pfn for gfn, (pfn, _) in world.table(root).items()} == {g: p for g, (p, _) in before.items()}


def test_a_bitmap_too_large_for_the_host_is_enomem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_change, "MAX_BITMAP_BYTES", 16)
    world = World()
    world.set_slot(0, 0x100, 128, HVA, 1)
    with pytest.raises(UapiError) as caught:
        world.set_slot(1, 0x200, 1, HVA, 1)
    assert caught.value.errno == errno.ENOMEM
    assert len(world.vm.slots) == 1
    world.set_slot(1, 0x200, 1, HVA)


# -- the second struct ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "flags", "allowed"),
    [(1, 3, True), (1, 4, False), (2, 3, True), (2, 4, True), (2, 5, False), (2, 6, False), (2, 8, False)],
)
def test_private_memory_is_named_by_the_second_struct_and_excludes_the_rest(
    version: int, flags: int, allowed: bool
) -> None:
    slots = Memslots(Gfn(1 << 34))
    region = MemoryRegion(0, flags, Gpa(0), 4096, HVA, version=version)
    if allowed:
        slots.plan(region)
    else:
        with pytest.raises(UapiError, match="flags"):
            slots.plan(region)


@pytest.mark.parametrize("offset", [1, (1 << 64) - 4096])
def test_the_offset_is_looked_at_only_with_the_flag(offset: int) -> None:
    slots = Memslots(Gfn(1 << 34))
    region = MemoryRegion(0, 4, Gpa(0), 4096, HVA, version=2, guest_memfd_offset=offset)
    with pytest.raises(UapiError, match="guest_memfd_offset"):
        slots.plan(region)
    slots.plan(replace(region, flags=0))


def test_without_smm_there_is_one_address_space() -> None:
    world = World(CpuFeatures(address_spaces=1))
    with pytest.raises(UapiError) as caught:
        world.set_slot(0x1_0000, 0, 1, HVA)
    assert caught.value.errno == errno.EINVAL
    World().set_slot(0x1_0000, 0, 1, HVA)


def test_a_kernel_without_smm_does_not_know_the_capability() -> None:
    without, with_smm = CpuFeatures(address_spaces=1), CpuFeatures()
    vm = World(without).vm
    assert [check_extension(without, asked, KvmCap.MULTI_ADDRESS_SPACE) for asked in (None, vm)] == [0, 0]
    assert check_extension(with_smm, World(with_smm).vm, KvmCap.MULTI_ADDRESS_SPACE) == 2


def test_a_vm_with_private_memory_has_no_smm() -> None:
    world = World()
    vm = Kvm(world.host, world.mm, kind=VmType.SW_PROTECTED)
    with pytest.raises(UapiError) as caught:
        world.run(vm.slots_change.set_memory_region(world.region(0x1_0000, 0, 1, HVA)))
    assert caught.value.errno == errno.EINVAL
    assert check_extension(CpuFeatures(), vm, KvmCap.MULTI_ADDRESS_SPACE) == 1
