"""A process's memory: what mmap and friends refuse, what a page holds, and when a change happens."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest

from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.reclaim import migrate
from kvmd.core.mm.space import TASK_SIZE, MmState
from kvmd.core.mm.vma import Prot
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Hva, Level
from tests.kit.kvmd import MM_CHANGES, RW, World
from tests.kit.refusals import errno_of

PAGE = 4096
MIB2 = 2 << 20


class Notifier:
    """Records; `gate` holds every start up."""

    def __init__(self, gate: Wait[None] | None = None) -> None:
        self.gate = gate
        self.log: list[tuple[str, int, int]] = []

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        self.log.append(("start", start, end))
        if self.gate is not None:
            await self.gate

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self.log.append(("end", start, end))

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        self.log.append(("age", start, end))
        return True


@pytest.fixture
def world() -> World:
    return World()


# -- mmap ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hva", "size", "level", "number"),
    [
        (None, 0, 1, errno.EINVAL),
        (None, -PAGE, 1, errno.EINVAL),
        (None, (64 << 40) + PAGE, 1, errno.ENOMEM),
        (None, (1 << 64) - 1, 1, errno.ENOMEM),
        (0x1001, PAGE, 1, errno.EINVAL),
        (PAGE, MIB2, 2, errno.EINVAL),
        (TASK_SIZE - PAGE, 2 * PAGE, 1, errno.ENOMEM),
        (0x5000_F000, 2 * PAGE, 1, errno.EEXIST),
        (0x4FFF_F000, 2 * PAGE, 1, errno.EEXIST),
        (0x5000_4000, PAGE, 1, errno.EEXIST),
        (0x4000_0000, 1 << 30, 3, errno.EEXIST),
    ],
)
def test_mmap_refuses(world: World, hva: int | None, size: int, level: int, number: int) -> None:
    world.map(16, hva=0x5000_0000)
    at = None if hva is None else Hva(hva)
    assert errno_of(lambda: world.run(world.mm.mmap(at, size, RW, Level(level)))) == number


def test_mmap_anywhere_gives_aligned_ranges_that_do_not_overlap(world: World) -> None:
    ranges = []
    for level, pages in ((1, 3), (2, 2), (1, 1), (3, 1), (1, 5)):
        size = pages * (PAGE << 9 * (level - 1))
        hva = world.map(pages, level)
        assert hva % (PAGE << 9 * (level - 1)) == 0
        ranges.append((hva, hva + size))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


# -- contents ------------------------------------------------------------------------------------------


def test_memory_is_zero_until_written_and_then_what_was_written(world: World) -> None:
    hva = world.map(4)
    assert world.run(world.mm.read(hva, 4 * PAGE)) == bytes(4 * PAGE)
    data = bytes(range(256)) * 17
    world.run(world.mm.write(Hva(hva + 4000), data))
    assert world.run(world.mm.read(Hva(hva + 4000), len(data))) == data
    assert world.run(world.mm.read(hva, 4000)) == bytes(4000)


def test_a_page_is_backed_on_first_touch_by_a_frame_of_its_size(world: World) -> None:
    small, large = world.map(4), world.map(2, 2)
    assert world.host.frames.in_use == 0
    world.run(world.mm.read(small, 1))
    assert world.host.frames.in_use == 1
    world.run(world.mm.write(Hva(large + MIB2 - 1), b"xy"))
    assert world.host.frames.in_use == 1 + 2 * 512
    page = world.mm.present_page(Hva(large + 12345))
    assert page is not None
    assert (page.hva, page.level) == (large, 2)
    assert world.mm.present_page(Hva(small + PAGE)) is None


@pytest.mark.parametrize(
    ("prot", "write", "allowed"),
    [
        (Prot.NONE, False, False),
        (Prot.NONE, True, False),
        (Prot.READ, False, True),
        (Prot.READ, True, False),
        (RW, False, True),
        (RW, True, True),
    ],
)
def test_protection_is_kept(world: World, prot: Prot, write: bool, allowed: bool) -> None:
    hva = world.map(1, prot=prot)
    if allowed:
        assert world.run(world.mm.fault_in(hva, write=write)).writable == write, "a read gets the zero page"
    else:
        assert errno_of(lambda: world.run(world.mm.fault_in(hva, write=write))) == errno.EFAULT


def test_beyond_a_mapping_is_efault(world: World) -> None:
    hva = world.map(2)
    for at in (hva - 1, hva + 2 * PAGE):
        assert errno_of(lambda at=at: world.run(world.mm.read(Hva(at), 1))) == errno.EFAULT  # type: ignore[misc]
    assert errno_of(lambda: world.run(world.mm.read(Hva(hva + PAGE), PAGE + 1))) == errno.EFAULT


# -- changes -------------------------------------------------------------------------------------------


def test_madvise_drops_exactly_the_pages_named(world: World) -> None:
    hva = world.map(4)
    world.run(world.mm.write(hva, b"x" * 4 * PAGE))
    world.run(dontneed(world.mm, Hva(hva + PAGE), 2 * PAGE))
    assert world.run(world.mm.read(hva, 4 * PAGE)) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


def test_migrate_keeps_the_contents_and_changes_the_frames(world: World) -> None:
    hva = world.map(3)
    data = bytes(i % 251 for i in range(2 * PAGE))
    world.run(world.mm.write(hva, data))
    before = [world.run(world.mm.fault_in(Hva(hva + i * PAGE), write=False)).pfn for i in range(2)]
    assert world.run(migrate(world.mm, hva, 3 * PAGE)) == 2
    after = [world.run(world.mm.fault_in(Hva(hva + i * PAGE), write=False)).pfn for i in range(2)]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert world.run(world.mm.read(hva, 2 * PAGE)) == data
    assert world.host.frames.in_use == 2


def test_migrating_a_huge_page_keeps_its_last_byte(world: World) -> None:
    hva = world.map(1, 2)
    world.run(world.mm.write(Hva(hva + MIB2 - 3), b"end"))
    assert world.run(migrate(world.mm, hva, MIB2)) == 1
    assert world.run(world.mm.read(Hva(hva + MIB2 - 3), 3)) == b"end"
    assert world.host.frames.in_use == 512


def test_munmap_in_the_middle_keeps_both_ends(world: World) -> None:
    hva = world.map(5)
    world.run(world.mm.write(hva, b"x" * 5 * PAGE))
    world.run(world.mm.munmap(Hva(hva + PAGE), 3 * PAGE))
    assert (
        world.run(world.mm.read(hva, PAGE))
        == world.run(world.mm.read(Hva(hva + 4 * PAGE), PAGE))
        == b"x" * PAGE
    )
    for i in (1, 2, 3):
        assert errno_of(lambda i=i: world.run(world.mm.read(Hva(hva + i * PAGE), 1))) == errno.EFAULT  # type: ignore[misc]
    assert world.host.frames.in_use == 2
    assert world.map(3, hva=hva + PAGE) == hva + PAGE


def test_munmap_of_several_mappings_and_the_holes_between(world: World) -> None:
    one, other = world.map(2, hva=0x10_0000), world.map(2, hva=0x20_0000)
    world.run(world.mm.write(one, b"1" * 2 * PAGE))
    world.run(world.mm.write(other, b"2" * 2 * PAGE))
    world.run(world.mm.munmap(Hva(one + PAGE), other - one))
    assert world.run(world.mm.read(one, PAGE)) == b"1" * PAGE
    assert world.run(world.mm.read(Hva(other + PAGE), PAGE)) == b"2" * PAGE
    assert world.host.frames.in_use == 2


@pytest.mark.parametrize("what", ["munmap", "migrate"])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, -PAGE), (1, PAGE), (-(1 << 50), PAGE), (0, 1 << 48), (0, (1 << 64) - 1)]
)
def test_a_range_that_is_none_is_einval(world: World, what: str, offset: int, size: int) -> None:
    hva = world.map(4)
    assert errno_of(lambda: world.run(MM_CHANGES[what](world.mm, Hva(hva + offset), size))) == errno.EINVAL


@pytest.mark.parametrize("what", ["munmap", "migrate"])
def test_a_huge_page_is_changed_whole_or_not_at_all(world: World, what: str) -> None:
    hva = world.map(2, 2)
    for offset, size in ((0, PAGE), (PAGE, MIB2), (MIB2, MIB2 - PAGE)):
        with pytest.raises(UapiError) as caught:
            world.run(MM_CHANGES[what](world.mm, Hva(hva + offset), size))
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("what", ["madvise_dontneed", "migrate"])
def test_a_hole_in_the_range_is_enomem(world: World, what: str) -> None:
    hva = world.map(2)
    assert errno_of(lambda: world.run(MM_CHANGES[what](world.mm, hva, 3 * PAGE))) == errno.ENOMEM


def test_migration_without_a_free_frame_is_enomem_and_loses_nothing(world: World) -> None:
    hva = world.map(512, 2)
    for i in range(511):
        world.run(world.mm.fault_in(Hva(hva + i * MIB2), write=True))
    world.run(world.mm.write(hva, b"first"))
    world.run(world.mm.write(Hva(hva + 511 * MIB2), b"last"))
    notifier = Notifier()
    world.mm.notifiers.append(notifier)
    assert errno_of(lambda: world.run(migrate(world.mm, hva, 512 * MIB2))) == errno.ENOMEM
    assert world.run(world.mm.read(hva, 5)) == b"first"
    assert world.run(world.mm.read(Hva(hva + 511 * MIB2), 4)) == b"last"
    assert [what for what, *_ in notifier.log] == ["start", "end"]


# -- notifiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["munmap", "madvise_dontneed", "migrate", "exit"])
def test_nothing_changes_before_every_notifier_has_let_go(world: World, what: str) -> None:
    hva = world.map(2)
    world.run(world.mm.write(hva, b"x" * PAGE))
    frame = world.run(world.mm.fault_in(hva, write=False)).pfn
    tag = world.bare.tags.read(frame)
    gates = [Wait[None](), Wait[None]()]
    notifiers = [Notifier(gate) for gate in gates]
    world.mm.notifiers += notifiers
    over = world.start(world.mm.exit() if what == "exit" else MM_CHANGES[what](world.mm, hva, PAGE))
    for gate in gates:
        assert not over.done
        assert world.bare.tags.read(frame) == tag, "the frame was given up too early"
        gate.set(None)
        world.flows.run_ready()
    assert over.done
    assert world.bare.tags.read(frame) != tag
    span = (0, TASK_SIZE) if what == "exit" else (hva, hva + PAGE)
    assert [notifier.log for notifier in notifiers] == [[("start", *span), ("end", *span)]] * 2


def test_exit_gives_everything_back_and_faults_no_more(world: World) -> None:
    small, large = world.map(8), world.map(2, 2)
    world.run(world.mm.write(small, b"x" * 8 * PAGE))
    world.run(world.mm.write(large, b"x"))
    world.run(world.mm.exit())
    assert world.host.frames.in_use == 0
    assert world.mm.state is MmState.EXITED
    assert errno_of(lambda: world.run(world.mm.fault_in(small, write=False))) == errno.EFAULT
    world.run(world.mm.exit())


def test_the_frames_of_a_process_carry_its_number(world: World) -> None:
    other: Mm = world.host.create_mm()
    mine, theirs = world.map(1), world.run(other.mmap(None, PAGE, RW, Level(1)))
    tags = world.bare.tags
    assert tags.read(world.run(world.mm.fault_in(mine, write=True)).pfn) & 0xFFFF == world.mm.id
    assert tags.read(world.run(other.fault_in(theirs, write=True)).pfn) & 0xFFFF == other.id
    assert world.mm.id != other.id


# -- an access that must not sleep ---------------------------------------------------------------------


def test_bytes_now_shows_what_is_there_and_makes_nothing(world: World) -> None:
    mm, hva = world.mm, world.map(2)
    assert mm.bytes_now(hva, 8, write=False) is None, "nobody touched it"
    world.run(mm.read(hva, 1))
    zeroes = mm.bytes_now(Hva(hva + 4090), 64, write=False)
    assert zeroes is not None
    assert bytes(zeroes) == bytes(6), "as far as the page goes"
    assert mm.bytes_now(hva, 8, write=True) is None, "the zero page is nobody's to write"
    world.run(mm.write(hva, b"page"))
    there = mm.bytes_now(hva, 4, write=True)
    assert there is not None
    there[:] = b"PAGE"
    assert world.run(mm.read(hva, 4)) == b"PAGE"
