"""guest_memfd and memory attributes: which page a gfn has, and when a frame may go."""

from __future__ import annotations

import errno
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.slots.guest_memfd import GuestMemfd, MemoryAttributes
from kvmd.core.vm import Kvm, VmType
from protocol.errors import UapiError
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.units import MIB, Gfn, GfnSpan, Gpa, Level
from tests.kit.kvmd import World

GFN, PAGES = 0x400, 16
PRIVATE = 8


class Protected(World):
    """A VM of type 1 with one slot that has a guest_memfd."""

    def __init__(self, kind: VmType = VmType.SW_PROTECTED, flags: int = 0) -> None:
        super().__init__()
        self.mm.notifiers.clear()
        self.vm = Kvm(self.host, self.mm, kind=kind)
        self.memfd = self.vm.private.create(PAGES << 12, flags)
        self.hva = self.map(PAGES)
        self.bind(0, GFN, self.memfd)
        self.cpu = self.create_vcpu()

    def bind(self, slot: int, gfn: int, memfd: GuestMemfd, offset: int = 0, pages: int = PAGES) -> None:
        region = replace(
            self.region(slot, gfn, pages, self.hva, 4),
            version=2,
            guest_memfd=lambda: memfd,
            guest_memfd_offset=offset,
        )
        self.run(self.vm.slots_change.set_memory_region(region))

    def attribute(self, page: int, value: int, pages: int = 1) -> None:
        self.run(self.vm.private.set_attributes(Gpa(GFN + page << 12), pages << 12, value, 0))


def test_a_private_page_and_a_shared_one_are_two_pages() -> None:
    world = Protected()
    world.guest_write(world.cpu, GFN << 12, b"shared")
    world.attribute(0, PRIVATE)
    assert world.guest_read(world.cpu, GFN << 12, 6).reads == [bytes(6)]
    world.guest_write(world.cpu, GFN << 12, b"secret")
    assert world.run(world.mm.read(world.hva, 6)) == b"shared", "the process cannot see it"
    assert check_vm(world.vm) == []
    world.attribute(0, 0)
    assert world.guest_read(world.cpu, GFN << 12, 6).reads == [b"shared"]


def test_private_without_a_page_leaves_with_a_memory_fault() -> None:
    world = Protected()
    world.set_slot(1, 0x800, 1, world.hva)
    world.run(world.vm.private.set_attributes(Gpa(0x800 << 12), 4096, PRIVATE, 0))
    result = world.guest_write(world.cpu, 0x800 << 12, b"x")
    assert (result.exit.reason, result.exit.errno) == (ExitReason.MEMORY_FAULT, errno.EFAULT)


def test_conversion_returns_when_no_importer_has_the_shared_alias() -> None:
    world = Protected()
    exported, importer = world.lend(), world.importer
    assert world.io_fault(exported, GFN) is FaultResult.FIXED
    wait = world.start(world.vm.private.set_attributes(Gpa(GFN << 12), 4096, PRIVATE, 0))
    assert not wait.done
    assert world.table(exported.root.hpa) == {}
    world.ack(importer)
    assert wait.done


def test_a_closed_files_frames_go_after_the_acks() -> None:
    world = Protected()
    exported, importer = world.lend(), world.importer
    world.attribute(0, PRIVATE)
    assert world.io_fault(exported, GFN) is FaultResult.FIXED
    frames = world.host.frames.in_use
    wait = world.start(world.vm.private.close(world.memfd))
    assert world.host.frames.in_use == frames
    fault = world.start(world.device_fault(GFN))
    assert not fault.done
    world.ack(importer)
    assert wait.done
    assert fault.result() is FaultResult.MEMORY_FAULT
    assert world.host.frames.in_use == frames - 1


def test_a_hole_is_taken_from_every_slot_that_has_it_and_reads_as_zeroes() -> None:
    world = Protected()
    world.set_slot(0, 0, 0, 0)
    world.bind(0, GFN, world.memfd, 0, 4)
    world.bind(1, 0x800, world.memfd, 4 << 12, 12)
    world.run(world.vm.private.set_attributes(Gpa(0), 0x1000 << 12, PRIVATE, 0))
    for gfn in (*range(GFN, GFN + 4), *range(0x800, 0x80C)):
        world.guest_write(world.cpu, gfn << 12, b"secret")
    world.run(world.vm.private.punch_hole(world.memfd, 3 << 12, 2 << 12))
    assert world.host.frames.in_use == 14
    assert [index for index in range(PAGES) if world.memfd.present(index) is None] == [3, 4]
    assert {GFN + 3, 0x800} & set(world.table()) == set()
    assert check_vm(world.vm) + check_memory(world.host.memory, world.host.processes) == []
    assert world.guest_read(world.cpu, 0x800 << 12, 6).reads == [bytes(6)]
    assert world.guest_read(world.cpu, 0x801 << 12, 6).reads == [b"secret"]


def test_a_slot_is_bound_once_the_hole_that_is_being_made_is_there() -> None:
    """Its pages lie in the hole: mapped before, they would be given back under the guest."""
    world = Protected()
    exported, importer = world.lend(), world.importer
    wait = world.start(world.vm.private.set_attributes(Gpa(0), 0x1000 << 12, PRIVATE, 0))
    wait = world.start(world.vm.slots_change.set_memory_region(world.region(0, 0, 0, 0)))
    while not wait.done:
        world.ack(importer)
    world.bind(0, GFN, world.memfd, 0, 2)
    assert world.io_fault(exported, GFN) is FaultResult.FIXED
    hole = world.start(world.vm.private.punch_hole(world.memfd, 0, 4 << 12))
    assert not hole.done
    region = replace(
        world.region(1, 0x800, 2, world.hva, 4),
        version=2,
        guest_memfd=lambda: world.memfd,
        guest_memfd_offset=2 << 12,
    )
    bound = world.start(world.vm.slots_change.set_memory_region(region))
    store = world.start(world.cpu.run([("w", 0x800 << 12, b"mine")]))
    assert not bound.done
    assert world.memfd.present(2) is None
    world.ack(importer)
    assert (hole.done, bound.done) == (True, True)
    assert store.result().exit is not None  # it was no RAM yet
    world.guest_write(world.cpu, 0x800 << 12, b"mine")
    assert world.guest_read(world.cpu, 0x800 << 12, 4).reads == [b"mine"]
    assert world.memfd.present(2) is not None
    assert check_vm(world.vm) + check_memory(world.host.memory, world.host.processes) == []


@pytest.mark.parametrize("what", ["free", "bound twice", "unknown", "mapped"])
def test_the_check_finds_private_memory_that_is_somebody_else_s(what: str) -> None:
    world = Protected()
    world.attribute(0, PRIVATE)
    world.guest_write(world.cpu, GFN << 12, b"x")
    page = world.memfd.present(0)
    slot = world.vm.slots.find(Gfn(GFN))
    assert page is not None
    assert slot is not None
    assert slot.private is not None
    if what == "free":
        world.host.frames.release(page.pfn, Level(1))
    elif what == "mapped":  # and the file has let go of it
        world.memfd.drop(range(1))
    elif what == "unknown":
        slot.private.unbind()
    else:
        world.vm.slots.replace(None, replace(slot, id=1, base_gfn=Gfn(0x800)))
    found = check_vm(world.vm)
    assert [sentence for sentence in found if sentence.startswith("I6")], found


def test_a_hole_beyond_the_end_is_no_hole_and_one_of_no_pages_is_einval() -> None:
    world = Protected()
    world.run(world.vm.private.punch_hole(world.memfd, PAGES << 12, 1 << 62))
    for offset, size in ((1, 4096), (0, 1), (0, 0)):
        with pytest.raises(UapiError) as caught:
            world.run(world.vm.private.punch_hole(world.memfd, offset, size))
        assert caught.value.errno == errno.EINVAL


def test_poisoned_private_memory_fails_a_device_and_signals_a_cpu() -> None:
    world = Protected()
    exported = world.export()
    world.attribute(0, PRIVATE)
    page = world.memfd.page(0)
    world.host.memory.poison(page)
    assert world.io_fault(exported, GFN) is FaultResult.HWPOISON
    assert world.guest_read(world.cpu, GFN << 12, 1).exit.sigbus is not None


def test_a_huge_page_stops_where_the_attribute_changes() -> None:
    world = Protected()
    hva = world.map(2, 2)
    world.set_slot(1, 0x800, 1024, hva)
    world.run(world.vm.private.set_attributes(Gpa(0x805 << 12), 4096, PRIVATE, 0))
    world.guest_write(world.cpu, 0x801 << 12, b"x")
    world.guest_write(world.cpu, 0xA01 << 12, b"x")
    levels = [world.vm.mmu.leaf_at(world.vm.mmu.roots[0], Gfn(gfn)) for gfn in (0x801, 0xA01)]
    assert [met.level if met else 0 for met in levels] == [1, 2]
    assert check_vm(world.vm) == []


def test_a_plain_vm_takes_shared_pages_from_a_file_that_can_be_mapped() -> None:
    world = Protected(VmType.DEFAULT, flags=1)
    world.guest_write(world.cpu, GFN << 12, b"inside")
    assert world.mm.present_page(world.hva) is None
    assert world.memfd.present(0) is not None
    assert check_vm(world.vm) == []


def test_a_plain_vm_has_no_attributes() -> None:
    world = Protected(VmType.DEFAULT)
    with pytest.raises(UapiError) as caught:
        world.attribute(0, PRIVATE)
    assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize(
    ("address", "size", "attributes", "flags"),
    [
        (0, 4096, 4, 0),
        (0, 4096, 8, 1),
        (0, 0, 8, 0),
        (1, 4096, 8, 0),
        (0, 1, 8, 0),
        ((1 << 64) - 4096, 4096, 8, 0),
    ],
)
def test_attributes_are_checked(address: int, size: int, attributes: int, flags: int) -> None:
    world = Protected()
    with pytest.raises(UapiError) as caught:
        world.run(world.vm.private.set_attributes(Gpa(address), size, attributes, flags))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("offset", "pages"), [(0, 17), (PAGES << 12, 1), (0, 16), (15 << 12, 1)])
def test_a_file_is_bound_within_its_size_and_once(offset: int, pages: int) -> None:
    world = Protected()
    with pytest.raises(UapiError) as caught:
        world.bind(1, 0x1000, world.memfd, offset, pages)
    assert caught.value.errno == errno.EINVAL
    assert len(world.memfd.bindings) == 1


def test_a_slot_with_a_file_can_only_be_deleted_and_lets_go_of_it_then() -> None:
    world = Protected()
    for gfn, flags in ((GFN + 1, 4), (GFN, 4), (GFN, 1), (GFN + 1, 0)):
        region = replace(world.region(0, gfn, PAGES, world.hva, flags), version=2)
        with pytest.raises(UapiError) as caught:
            world.run(world.vm.slots_change.set_memory_region(region))
        assert caught.value.errno == errno.EINVAL
    world.set_slot(0, 0, 0, 0)
    world.bind(1, GFN, world.memfd)


def test_a_binding_refused_last_is_undone() -> None:
    world = Protected()
    world.set_slot(0, 0, 0, 0)
    with pytest.raises(UapiError):
        world.bind(0, 1 << 34, world.memfd)
    assert world.memfd.bindings == []


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans()), max_size=20),
)
def test_attributes_are_those_of_a_set(changes: list[tuple[int, int, bool]]) -> None:
    attributes, model = MemoryAttributes(supported=True), set[int]()
    for start, count, private in changes:
        attributes.set(GfnSpan.of_pages(Gfn(start), count), private=private)
        pages = set(range(start, start + count))
        model = model | pages if private else model - pages
    assert {gfn for gfn in range(60) if attributes.is_private(Gfn(gfn))} == model
    spans = list(attributes)
    assert {gfn for span in spans for gfn in range(span.start, span.end)} == model
    assert all(one.end < other.start for one, other in pairwise(spans))
    huge = attributes.max_level(Gfn(5), Level(2)) == 2
    assert huge == (not model), "512 pages, of which at most 52 are private"


# -- KVM_PRE_FAULT_MEMORY ------------------------------------------------------------------------------


def test_a_prefault_maps_and_counts_as_no_access() -> None:
    world = World()
    hva = world.map(16)
    world.set_slot(0, GFN, 16, hva)
    world.run(world.mm.write(hva, b"a page of its own, to be mapped writable"))
    vcpu = world.create_vcpu()
    left = world.run(pre_fault_memory(vcpu, world.vm.fault_path, Gpa(GFN << 12), 4 << 12, 0))
    assert left == ((GFN + 4) << 12, 0)
    entries = [met.entry for met in world.vm.mmu.leaves(world.vm.mmu.roots[0])]
    assert len(entries) == 4
    assert not any(entry & bits.ACCESSED for entry in entries)
    assert vcpu.arch.ept_violations == 0
    world.guest_write(vcpu, GFN << 12, b"x")
    assert vcpu.arch.ept_violations == 0


def test_a_prefault_tells_what_is_left_and_an_error_only_if_nothing_was_done() -> None:
    world = World()
    world.set_slot(0, GFN, 2, world.map(2))
    vcpu = world.create_vcpu()
    assert world.run(pre_fault_memory(vcpu, world.vm.fault_path, Gpa(GFN << 12), 4 << 12, 0)) == (
        (GFN + 2) << 12,
        2 << 12,
    )
    for gpa, size, flags, number in (
        ((GFN + 2) << 12, 4096, 0, errno.ENOENT),
        (1 << 50, 4096, 0, errno.ENOENT),
        (GFN << 12, 4096, 1, errno.EINVAL),
        (GFN << 12, 0, 0, errno.EINVAL),
        (1, 4096, 0, errno.EINVAL),
        ((1 << 64) - 4096, 4096, 0, errno.EINVAL),
    ):
        with pytest.raises(UapiError) as caught:
            world.run(pre_fault_memory(vcpu, world.vm.fault_path, Gpa(gpa), size, flags))
        assert caught.value.errno == number


def test_a_prefault_of_huge_pages_goes_leaf_by_leaf() -> None:
    world = World()
    world.set_slot(0, GFN, 1024, world.map(2, 2))
    left = world.run(pre_fault_memory(world.create_vcpu(), world.vm.fault_path, Gpa(GFN << 12), 4 * MIB, 0))
    assert left[1] == 0
    assert world.vm.mmu.roots[0].leaves == [0, 0, 2, 0]
