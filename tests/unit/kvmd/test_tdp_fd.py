"""The exported TDP: creation's checks in their order, metadata, importers, faults, release."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from kvmd.core.export.tdp_fd import CreateTdpFd, Exporter, TdpFaultType, check_create
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.vm import Kvm
from protocol.errors import UapiError
from protocol.units import Gfn, Level
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import READ, WRITE, World
from tests.kit.lent import Backed


@pytest.fixture
def world() -> World:
    return Backed(0x100, 16)


@pytest.mark.rfc("RFC-02", "RFC-03", "RFC-04", "RFC-05", "RFC-09", "RFC-10")
@pytest.mark.parametrize(
    ("request_", "vcpus", "width", "number", "word"),
    [
        (CreateTdpFd(2, 1, 1), 0, 0, errno.EINVAL, "as_id 2"),
        (CreateTdpFd(0, 1, 0), 0, 0, errno.EINVAL, "both 0"),
        (CreateTdpFd(0, 0, 1), 0, 0, errno.EINVAL, "both 0"),
        (CreateTdpFd(0, 0, 0), 0, 0, errno.EINVAL, "no vCPU"),
        (CreateTdpFd(1, 0, 0), 0, 0, errno.EINVAL, "only 0"),
        (CreateTdpFd(0, 0, 0), 1, 0, errno.EINVAL, "MAXPHYADDR"),
        (CreateTdpFd(0, 0, 0), 1, 31, errno.EINVAL, "MAXPHYADDR"),
    ],
)
def test_the_first_failing_check_speaks(
    request_: CreateTdpFd, vcpus: int, width: int, number: int, word: str
) -> None:
    with pytest.raises(UapiError, match=word) as caught:
        check_create(request_, 2, lambda _: False, Exporter(vcpus, width))
    assert caught.value.errno == number


@pytest.mark.rfc("RFC-06", "RFC-08")
def test_an_address_space_is_exported_once(world: World) -> None:
    exported = world.export()
    with pytest.raises(UapiError) as caught:
        world.export()
    assert caught.value.errno == errno.EEXIST
    world.run(world.vm.exports.close(exported))
    world.export()


@pytest.mark.rfc("RFC-23", "RFC-25", "RFC-26")
@pytest.mark.parametrize(("width", "level"), [(46, 4), (52, 5)])
def test_the_metadata_say_what_the_root_is(width: int, level: int) -> None:
    world = World(CpuFeatures(maxphyaddr=52, ept_levels=5, max_page_level=Level(2)))
    world.create_vcpu(maxphyaddr=width)
    raw = world.export().meta.to_bytes()
    root = world.vm.exports.tdps[0].root
    assert raw[:24] == bytes(
        [1, 0, 0, 0, level, 0, 0, 0, *root.hpa.to_bytes(8, "little"), 2, 0, 0, 0, 0, 0, 0, 0]
    )
    masks = [int.from_bytes(raw[at : at + 8], "little") for at in range(24, 104, 8)]
    assert all(mask & 0x800 for mask in masks)
    assert not any(mask >> 46 for mask in masks), "52 address bits leave none reserved"


@pytest.mark.rfc("RFC-21")
def test_the_root_of_a_running_vcpu_is_the_one_lent_out(world: World) -> None:
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"x")
    exported = world.export()
    assert exported.root is world.vm.vcpus[0].arch.roots[0]
    assert set(world.table(exported.meta.root_hpa)) == {0x100}


# -- importers -----------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-106")
def test_importers_are_told_of_every_flush_until_they_unregister(world: World) -> None:
    exported, one, other = world.export(), SlowImporter(), SlowImporter()
    exported.register_importer("one", one)
    world.start(world.vm.flusher.flush(None))
    exported.register_importer("other", other)
    world.start(world.vm.flusher.flush(None))
    exported.unregister_importer("one", one)
    world.start(world.vm.flusher.flush(None))
    assert [epoch for *_, epoch in one.heard] == [1, 2]
    assert [epoch for *_, epoch in other.heard] == [2, 3]


@pytest.mark.rfc("RFC-105", "RFC-106")
@pytest.mark.defect("B-09")
def test_a_name_is_taken_once_and_only_its_owner_gives_it_back(world: World) -> None:
    """Defect B-09: a second importer must not push out the first."""
    exported, one, other = world.export(), SlowImporter(), SlowImporter()
    exported.register_importer("name", one)
    with pytest.raises(UapiError) as caught:
        exported.register_importer("name", other)
    assert caught.value.errno == errno.EBUSY
    exported.unregister_importer("name", other)
    exported.unregister_importer("unknown", one)
    assert exported.importers == 1
    world.start(world.vm.flusher.flush(None))
    assert len(one.heard) == 1
    exported.unregister_importer("name", one)
    exported.register_importer("name", other)


@pytest.mark.rfc("RFC-89")
@pytest.mark.parametrize(("another_root", "told"), [(False, 0), (True, 1)])
def test_a_flush_that_another_root_caused_is_told_as_well(
    world: World, another_root: bool, told: int
) -> None:
    exported, importer = world.export(), SlowImporter()
    exported.register_importer("one", importer)
    world.set_slot(1, 0x200, 1, world.map(1))
    if another_root:
        world.vm.mmu.get_root(replace(exported.root.role, level=Level(5)))
    world.start(world.vm.slots_change.set_memory_region(world.region(1, 0, 0, 0)))
    assert len(importer.heard) == told, "the exported root had nothing to lose"


@pytest.mark.rfc("RFC-88")
def test_a_flush_is_told_in_bytes_and_everything_as_all_ones(world: World) -> None:
    exported, importer = world.export(), SlowImporter()
    exported.register_importer("one", importer)
    exported.flush_notify(None, 1)
    span = world.vm.slots.find(Gfn(0x100))
    assert span is not None
    exported.flush_notify(span.span, 2)
    assert importer.heard == [(0, 0xFFFF_FFFF_FFFF_FFFF, 1), (0x10_0000, 0x1_0000, 2)]


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-67", "RFC-79")
@pytest.mark.defect("B-13")
def test_a_fault_maps_the_page_as_a_vcpus_would_have(world: World) -> None:
    """Bit for bit (defect B-13: the second one is a success too)."""
    exported = world.export()
    assert world.io_fault(exported, 0x100) is FaultResult.FIXED
    assert world.io_fault(exported, 0x100) is FaultResult.SPURIOUS
    assert world.io_fault(exported, 0x100, READ) is FaultResult.SPURIOUS
    by_device = bytes(world.bare.tables)
    twin = World()
    twin.set_slot(0, 0x100, 16, twin.map(16))
    twin.guest_write(twin.create_vcpu(), 0x10_0000, b"x")
    assert by_device == twin.bare.tables


def test_a_read_fault_maps_a_writable_page_writable(world: World) -> None:
    exported = world.export()
    world.run(world.mm.write(next(iter(world.vm.slots)).hva, b"the process's own by now"))
    assert world.io_fault(exported, 0x100, READ) is FaultResult.FIXED
    assert world.io_fault(exported, 0x100, WRITE) is FaultResult.SPURIOUS


@pytest.mark.rfc("RFC-71", "RFC-72")
@pytest.mark.parametrize(
    ("gfn", "kind", "result"),
    [
        (0xFF, READ, FaultResult.NO_SLOT),
        (0x110, WRITE, FaultResult.NO_SLOT),
        (1 << 36, READ, FaultResult.NO_SLOT),
        ((1 << 36) + 0x100, READ, FaultResult.NO_SLOT),
        ((1 << 64) - 1, READ, FaultResult.NO_SLOT),
        (0x200, WRITE, FaultResult.READONLY),
        (0x200, READ, FaultResult.FIXED),
        (0x300, READ, FaultResult.NO_PAGE),
    ],
)
def test_a_fault_that_cannot_be_resolved_says_why(
    world: World, gfn: int, kind: TdpFaultType, result: FaultResult
) -> None:
    world.set_slot(1, 0x200, 1, world.map(1), flags=2)
    world.set_slot(2, 0x300, 1, 0x7000_0000)
    assert world.io_fault(world.export(), gfn, kind) is result


@pytest.mark.rfc("RFC-74", "RFC-75", "RFC-76")
def test_a_fault_by_nobody_for_nothing_or_after_the_end_is_refused(world: World) -> None:
    exported = world.export()
    nothing = TdpFaultType(read=False, write=False, exec=False)
    for token, kind, number in ((77, nothing, errno.EINVAL), (78, READ, errno.EINVAL)):
        with pytest.raises(UapiError) as caught:
            world.run(exported.fault(world.vm.fault_path, token, Gfn(0x100), kind))
        assert caught.value.errno == number
    world.run(world.mm.exit())
    with pytest.raises(UapiError) as caught:
        world.io_fault(exported, 0x100)
    assert caught.value.errno == errno.EPERM


# -- release -------------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-102")
@pytest.mark.defect("B-18")
def test_release_keeps_the_root_for_the_vcpus(world: World) -> None:
    exported = world.export()
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"kept")
    world.run(world.vm.exports.close(exported))
    assert world.table(exported.meta.root_hpa).keys() == {0x100}
    assert world.guest_read(world.vm.vcpus[0], 0x10_0000, 4).reads == [b"kept"]
    world.set_slot(0, 0, 0, 0)
    assert exported.root.invalid, "no longer exported, so a memslot change may drop it"


def test_a_vm_whose_tdp_is_exported_is_not_destroyed(world: World) -> None:
    world.export()
    with pytest.raises(AssertionError, match="keeps its VM"):
        world.run(world.vm.destroy())


@pytest.mark.defect("B-23")
def test_a_vm_that_is_destroyed_gives_every_table_page_back(world: World) -> None:
    exported = world.export()
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"x")
    other = Kvm(world.host, world.mm)
    world.run(world.vm.exports.close(exported))
    world.run(world.vm.destroy())
    assert (world.host.pool.in_use, world.mm.notifiers) == (0, [other.host_changes])
    assert not any(world.bare.tables)
