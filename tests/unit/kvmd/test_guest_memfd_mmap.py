"""A guest_memfd that a process maps: one page for the guest and for its VMM [KVM guest_memfd.c]."""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from typing import Any

import pytest

from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.mm.failure import poison
from kvmd.core.mm.madvise import ADVICE
from kvmd.core.mm.reclaim import migrate, swap_out
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.slots.guest_memfd import GuestMemfd
from kvmd.core.slots.memslot import MemoryRegion
from protocol.errors import UapiError
from protocol.units import Gpa, Hva
from tests.kit.kvmd import RW, World
from tests.unit.kvmd.mm.test_sleeps import during

PAGE, PAGES = 4096, 4
MMAP, INIT_SHARED = 1, 2
GPA, HVA = 0x1000_0000, Hva(0x5000_0000)
WITH_MEMFD = 4


@pytest.fixture
def world() -> World:
    return World()


def made(world: World, flags: int = MMAP | INIT_SHARED) -> GuestMemfd:
    return world.vm.private.create(PAGES * PAGE, flags)


def mapped(world: World, memfd: GuestMemfd) -> Hva:
    return world.run(world.mm.mmap(HVA, PAGES * PAGE, RW, shared=True, file=memfd))


def bound(world: World, memfd: GuestMemfd) -> None:
    """A slot whose pages are the file's, and whose hva its mapping."""
    region = MemoryRegion(
        *(1, WITH_MEMFD, Gpa(GPA), PAGES * PAGE, HVA),
        version=2,
        guest_memfd_offset=0,
        guest_memfd=lambda: memfd,
    )
    world.run(world.vm.slots_change.set_memory_region(region))


def answer(world: World, flow: Coroutine[Any, None, Any]) -> int:
    try:
        world.run(flow)
    except UapiError as error:
        return error.errno
    return 0


def books_are_right(world: World) -> None:
    assert check_memory(world.host.memory, [world.mm]) == []
    assert check_vm(world.vm) == []


@pytest.mark.parametrize(
    ("flags", "shared", "mmap", "read"),
    [
        (0, True, errno.ENODEV, None),
        (INIT_SHARED, True, errno.ENODEV, None),
        (MMAP, False, errno.EINVAL, None),
        (MMAP, True, 0, errno.EFAULT),  # SIGBUS: no page of it is shared
        (MMAP | INIT_SHARED, True, 0, 0),
    ],
)
def test_who_may_map_it_and_who_may_touch_it(
    world: World, flags: int, shared: bool, mmap: int, read: int | None
) -> None:
    memfd = made(world, flags)
    flow = world.mm.mmap(HVA, (PAGES + 1) * PAGE, RW, shared=shared, file=memfd)
    assert answer(world, flow) == mmap
    if read is not None:
        assert answer(world, world.mm.read(HVA, 1)) == read
        assert answer(world, world.mm.write(HVA, b"x")) == read
        assert answer(world, world.mm.read(Hva(HVA + PAGES * PAGE), 1)) == errno.EFAULT, "beyond its end"


def test_guest_and_process_have_the_same_page(world: World) -> None:
    memfd = made(world)
    mapped(world, memfd)
    bound(world, memfd)
    vcpu = world.create_vcpu()
    world.run(world.mm.write(HVA, b"host"))
    assert world.guest_read(vcpu, GPA, 4).reads == [b"host"]
    world.guest_write(vcpu, GPA + PAGE, b"guest")
    assert world.run(world.mm.read(Hva(HVA + PAGE), 5)) == b"guest"
    assert world.run(vcpu.run([("add", GPA, 1, 1)], 0)).done, "and so has the emulator"
    assert world.guest_read(vcpu, GPA, 4).reads == [b"iost"]
    assert world.host.frames.in_use == 2
    books_are_right(world)


@pytest.mark.parametrize("how", ["the fd", "the mapping"])
def test_a_hole_takes_the_page_from_both(world: World, how: str) -> None:
    memfd = made(world)
    mapped(world, memfd)
    bound(world, memfd)
    vcpu = world.create_vcpu()
    world.guest_write(vcpu, GPA, b"guest")
    assert world.run(world.mm.read(HVA, 5)) == b"guest"
    punch = memfd.punch_hole(0, PAGE) if how == "the fd" else ADVICE["remove"](world.mm, HVA, 1)
    world.run(punch)
    assert world.host.frames.in_use == 0
    assert world.guest_read(vcpu, GPA, 5).reads == [bytes(5)]
    assert world.run(world.mm.read(HVA, 5)) == bytes(5)
    books_are_right(world)


def test_a_page_that_is_mapped_while_the_hole_is_made_is_taken_too(world: World) -> None:
    memfd = made(world)
    mapped(world, memfd)
    world.run(world.mm.write(HVA, b"x"))
    late = Hva(HVA + 16 * PAGE)

    def map_late() -> None:
        world.run(world.mm.mmap(late, PAGE, RW, shared=True, file=memfd))
        assert world.run(world.mm.read(late, 1)) == b"x"

    during(world, world.mm, memfd.punch_hole(0, PAGE), map_late)
    assert world.host.frames.in_use == 0
    assert world.run(world.mm.read(late, 1)) == b"\0"
    books_are_right(world)


def test_a_mapping_keeps_it_when_its_fd_is_closed(world: World) -> None:
    memfd = made(world)
    released: list[bool] = []
    memfd.release = lambda: released.append(True)
    mapped(world, memfd)
    world.run(world.mm.write(HVA, b"kept"))
    memfd.put()
    assert (world.run(world.mm.read(HVA, 4)), released) == (b"kept", [])
    world.run(world.mm.munmap(HVA, PAGES * PAGE))
    assert released == [True]
    world.run(world.vm.private.close(memfd))
    assert world.host.frames.in_use == 0


def test_its_pages_stay_where_they_are(world: World) -> None:
    memfd = made(world)
    mapped(world, memfd)
    world.run(world.mm.write(HVA, b"x"))
    page = world.mm.present_page(HVA)
    assert world.run(migrate(world.mm, HVA, PAGE)) == 0
    assert world.run(swap_out(world.mm, HVA, PAGE)) == 0
    assert world.mm.present_page(HVA) is page
    assert answer(world, poison(world.mm, HVA, PAGE)) == errno.EOPNOTSUPP
    uffd = Userfaultfd(world.mm, user_mode_only=False)
    assert answer(world, uffd.register(HVA, PAGE, missing=True, wp=False)) == errno.EINVAL
    assert answer(world, ADVICE["dontneed"](world.mm, HVA, PAGE)) == 0
    assert world.run(world.mm.read(HVA, 1)) == b"x"


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (-PAGE, PAGE, errno.EINVAL),
        (0, 0, errno.EINVAL),
        (0, -PAGE, errno.EINVAL),
        (1, PAGE, errno.EINVAL),
        (0, PAGE + 1, errno.EINVAL),
        (PAGE, (1 << 63) - PAGE, errno.EFBIG),
        (1, (1 << 63) - 1, errno.EFBIG),  # before alignment is looked at
        (64 * PAGE, PAGE, 0),
    ],
)
def test_punch_hole_asks_for_whole_pages_that_a_file_can_have(
    world: World, offset: int, size: int, expected: int
) -> None:
    assert answer(world, made(world).punch_hole(offset, size)) == expected
