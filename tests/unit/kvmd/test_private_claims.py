"""Private memory and an MMU of iommufdd's kind: who comes second to an address is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.userfaultfd import Userfaultfd
from protocol.errors import UapiError
from protocol.units import Gfn, GfnSpan, Gpa, Hva
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.kvmd import RW, WRITE
from tests.planted.plugin import Plants
from tests.unit.kvmd.test_private_memory import GFN, PAGES, PRIVATE, Protected

PAGE = 4096
USES = ["watch", "pin"]


class Beside(Protected):
    """A VM with private memory, and a mirror of its process; the slot's page 0 is its hva."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror(self.mm)
        self.run(self.mirror.register(SlowImporter(), HandLease()))

    def at(self, page: int) -> Hva:
        return Hva(self.hva + page * PAGE)

    def use(self, how: str, page: int, pages: int = 1) -> None:
        if how == "watch":
            self.mirror.watch(self.at(page), pages * PAGE)
        else:
            self.run(self.mirror.pin(self.at(page), pages * PAGE, write=True))

    def give_up(self, how: str, page: int, pages: int = 1) -> None:
        if how == "watch":
            self.mirror.unwatch(self.at(page), pages * PAGE)
        else:
            self.run(self.mirror.unpin(self.at(page), pages * PAGE))

    def convert(self, page: int, pages: int = 1) -> Coroutine[Any, None, None]:
        return self.vm.private.set_attributes(Gpa(GFN + page << 12), pages << 12, PRIVATE, 0)

    def refused(self, act: Callable[[], object]) -> None:
        with pytest.raises(UapiError) as caught:
            act()
        assert caught.value.errno == errno.EBUSY
        assert check_vm(self.vm) == []


@pytest.mark.parametrize("how", USES)
def test_what_is_mapped_for_a_device_becomes_private_only_once_it_is_unmapped_there(how: str) -> None:
    world = Beside()
    world.use(how, 2, 3)
    for first, pages in ((0, 3), (4, 1), (3, 1), (0, PAGES)):
        world.refused(lambda first=first, pages=pages: world.run(world.convert(first, pages)))  # type: ignore[misc]
    world.run(world.convert(0, 2))
    world.run(world.convert(5, PAGES - 5))
    assert not world.vm.private.attributes.is_private(Gfn(GFN + 2))
    world.give_up(how, 2, 3)
    world.run(world.convert(2, 3))
    assert check_vm(world.vm) == []


@pytest.mark.parametrize("how", USES)
def test_what_is_private_is_mapped_for_a_device_only_once_it_is_shared(how: str) -> None:
    world = Beside()
    world.run(world.convert(2, 3))
    for first, pages in ((0, 3), (4, 1), (3, 1), (0, PAGES)):
        world.refused(lambda first=first, pages=pages: world.use(how, first, pages))  # type: ignore[misc]
    assert world.mm.pinned_pages == 0
    world.use(how, 0, 2)
    world.attribute(2, 0, 3)
    world.use(how, 2, 3)
    assert check_vm(world.vm) == []


@pytest.mark.parametrize("how", USES)
def test_while_it_is_converted_nobody_maps_it(how: str) -> None:
    world = Beside()
    exported, importer = world.lend(), world.importer
    world.io_fault(exported, GFN)
    converted = world.start(world.convert(0))
    assert not converted.done
    world.refused(lambda: world.use(how, 0))
    world.ack(importer)
    converted.result()
    world.refused(lambda: world.use(how, 0))


def test_a_pin_that_sleeps_while_its_page_is_converted_is_none() -> None:
    world = Beside()
    uffd = Userfaultfd(world.mm, user_mode_only=False)
    world.run(uffd.register(world.hva, PAGES * PAGE, missing=True, wp=False))
    world.run(uffd.copy(world.at(0), b"x" * PAGE, wp=False))
    pin = world.start(world.mirror.pin(world.at(0), 2 * PAGE, write=True))
    assert not pin.done
    world.run(world.convert(1))
    world.refused(lambda: world.run(world.convert(0)))
    world.run(uffd.copy(world.at(1), b"x" * PAGE, wp=False))
    world.refused(pin.result)
    assert world.mm.pinned_pages == 0


def test_a_fault_that_sleeps_while_its_page_is_converted_maps_the_private_one() -> None:
    """What it looked up is the shared one, and nobody would zap that any more."""
    world = Beside()
    exported = world.lend()
    uffd = Userfaultfd(world.mm, user_mode_only=False)
    world.run(uffd.register(world.hva, PAGES * PAGE, missing=True, wp=False))
    fault = world.start(exported.fault(world.vm.fault_path, 77, Gfn(GFN), WRITE))
    world.do(world.convert(0))
    world.run(uffd.copy(world.at(0), b"x" * PAGE, wp=False))
    assert fault.result() is FaultResult.FIXED
    assert world.table()[GFN] == (world.memfd.page(0).pfn, True)
    assert check_vm(world.vm) == []


def test_half_a_huge_page_is_a_device_s_and_the_other_half_private() -> None:
    world = Beside()
    hva = world.map(1, 2)
    world.set_slot(1, 0x800, 512, hva)
    world.run(world.mirror.pin(hva, 256 * PAGE, write=True))
    world.run(world.vm.private.set_attributes(Gpa(0x900 << 12), PAGE, PRIVATE, 0))
    for gfn in (0x800, 0x8FF):
        flow = world.vm.private.set_attributes(Gpa(gfn << 12), PAGE, PRIVATE, 0)
        world.refused(lambda flow=flow: world.run(flow))  # type: ignore[misc]


def test_a_slot_that_comes_with_private_gfns_wants_its_memory_to_be_no_device_s() -> None:
    world = Beside()
    world.set_slot(0, 0, 0, 0)
    world.run(world.convert(0))
    world.use("watch", 0)
    world.refused(lambda: world.bind(0, GFN, world.memfd))
    world.refused(lambda: world.set_slot(0, GFN, 1, world.hva))
    assert world.memfd.bindings == []
    world.set_slot(0, GFN + 1, 1, world.hva)
    world.refused(lambda: world.set_slot(0, GFN, 1, world.hva))
    world.give_up("watch", 0)
    world.io_fault(world.lend(), GFN + 1)
    moved = world.start(world.vm.slots_change.set_memory_region(world.region(0, GFN, 1, world.hva)))
    assert not moved.done
    world.refused(lambda: world.use("watch", 0))
    world.settle(moved)
    world.refused(lambda: world.use("watch", 0))


def test_claims_end_with_who_has_them() -> None:
    world = Beside()
    world.use("watch", 0)
    world.run(world.mirror.close())
    world.run(world.convert(0))
    other = Mirror(world.mm)
    world.run(other.register(SlowImporter(), HandLease()))
    with pytest.raises(UapiError):
        other.watch(world.hva, PAGE)
    world.run(world.vm.destroy())
    other.watch(world.hva, PAGE)


@pytest.mark.parametrize("second", ["R24-mapped-while-converted", "R24-claim-not-asked"])
def test_the_check_finds_an_address_that_both_have(second: str, plant: Plants) -> None:
    """Planted bug: who comes second is not refused."""
    world = Beside()
    plant(second)
    if second == "R24-mapped-while-converted":
        world.run(world.convert(0))
        world.use("pin", 0)
    else:
        world.use("pin", 0)
        world.run(world.convert(0))
    assert [found[:4] for found in check_vm(world.vm)] == ["I27:"]


@pytest.mark.parametrize(("start", "end"), [(0, 4), (3, 5), (4, 6), (7, 9), (9, 12), (0, 20)])
def test_any_private_is_what_a_look_at_each_gfn_says(start: int, end: int) -> None:
    world = Protected()
    attributes = world.vm.private.attributes
    for first, last in ((4, 6), (8, 9), (11, 14)):
        attributes.set(GfnSpan(Gfn(first), Gfn(last)), private=True)
    each = any(attributes.is_private(Gfn(gfn)) for gfn in range(start, end))
    assert attributes.any_private(GfnSpan(Gfn(start), Gfn(end))) == each


class Filed(Beside):
    """The slot shows a file, from its page `offset` on, which the mirror has open."""

    def __init__(self, offset: int = 3) -> None:
        super().__init__()
        self.file = MemoryFile(self.host.memory, "file", (PAGES + offset) * PAGE)
        self.offset = offset
        at = offset * PAGE
        self.run(self.mm.mmap(self.hva, PAGES * PAGE, RW, shared=True, file=self.file, offset=at, fixed=True))
        self.number = self.mirror.open_file(self.file)

    def pin_file(self, page: int, pages: int = 1) -> None:
        """By offset, of what the slot shows as its `page`."""
        at = Hva((self.offset + page) * PAGE)
        self.run(self.mirror.pin(at, pages * PAGE, write=True, area=7, file=self.number))


def test_what_a_device_has_by_its_offset_in_a_file_is_mapped_like_what_it_has_by_address() -> None:
    """IOMMU_IOAS_MAP_FILE: no address of the process is named, and the page is the guest's all the same."""
    world = Filed()
    world.pin_file(2, 3)
    world.refused(lambda: world.run(world.convert(0, 3)))
    world.refused(lambda: world.run(world.convert(4)))
    world.run(world.convert(5))
    world.run(world.convert(0, 2))
    world.refused(lambda: world.pin_file(1))
    world.refused(lambda: world.pin_file(3, 3))
    world.run(world.mirror.unpin(Hva((world.offset + 2) * PAGE), 3 * PAGE, area=7))
    world.run(world.convert(2, 3))
    assert check_vm(world.vm) == []


@pytest.mark.parametrize("page", [0, PAGES - 1])
def test_what_a_device_has_of_a_file_beside_what_is_mapped_of_it_is_nobody_s(page: int) -> None:
    """The guest has other memory there since, and what of the file is mapped before or behind it is free."""
    world = Filed()
    world.run(world.mm.mmap(world.at(page), PAGE, RW, fixed=True))
    world.pin_file(page)
    world.run(world.convert(0, PAGES))
    assert check_vm(world.vm) == []


@pytest.mark.parametrize("how", ["mmap", "mremap", "grown"])
def test_a_file_of_a_device_s_is_not_mapped_where_memory_is_private(how: str) -> None:
    """Only its pages that the device has are not: the first three are."""
    world, offset = Filed(), 3 * PAGE
    world.run(world.mm.munmap(world.hva, PAGES * PAGE))
    world.pin_file(3)
    world.run(world.convert(0, PAGES))
    flow: dict[str, Callable[[int], Coroutine[Any, None, Any]]] = {
        "mmap": lambda pages: world.mm.mmap(
            world.at(0), pages * PAGE, RW, shared=True, file=world.file, offset=offset, fixed=True
        ),
        "mremap": lambda pages: mremap(world.mm, elsewhere, pages * PAGE, pages * PAGE, world.at(0)),
        "grown": lambda pages: mremap(world.mm, world.at(0), PAGE, pages * PAGE),
    }
    mapped = partial(world.mm.mmap, size=4 * PAGE, prot=RW, shared=True, file=world.file, offset=offset)
    elsewhere = world.run(mapped(Hva(0x4000_0000)))
    if how == "grown":
        world.run(mapped(world.at(0), size=PAGE))
    world.refused(lambda: world.run(flow[how](4)))
    world.run(flow[how](3))
    assert check_vm(world.vm) == []


def test_an_offset_is_no_address() -> None:
    """A file's byte 0x3000 says nothing of what the process has at 0x3000."""
    world = Beside()
    file = MemoryFile(world.host.memory, "file", 8 * PAGE)
    number = world.mirror.open_file(file)
    world.run(world.mirror.pin(Hva(0), 8 * PAGE, write=True, area=7, file=number))
    assert not world.mirror.maps(Hva(0), Hva(8 * PAGE))


def test_the_check_of_what_is_pinned_by_offset_can_fail(plant: Plants) -> None:
    world = Filed()
    world.run(world.convert(2))
    plant("R24-mapped-while-converted")
    world.pin_file(2)
    assert [found[:3] for found in check_vm(world.vm)] == ["I27"]
