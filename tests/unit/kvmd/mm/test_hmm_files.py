"""A mirror that pins pages of files: whose they are, who pays, and that a process takes them over whole."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.space import UNMAP_BATCH, MmEvent
from kvmd.core.mm.userfaultfd import Userfaultfd
from protocol.flow import Wait
from protocol.units import Hva, Pfn
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.mirrors import MIB2, PAGE, MirroredPages


class MirroredFile(MirroredPages):
    """A mirror of its own for a file of 8 pages; `heir` may take over."""

    def __init__(self, account: str = "mm", level: int = 1) -> None:
        super().__init__()
        self.page = PAGE << 9 * (level - 1)
        self.file = MemoryFile(self.memory, "file", 8 * self.page, level)  # type: ignore[arg-type]
        self.mirror = Mirror(self.mm)
        self.run(self.mirror.register(SlowImporter(), HandLease(), account))  # type: ignore[arg-type]
        self.number = self.mirror.open_file(self.file)
        self.heir: Mm = self.host.create_mm()

    def pin_file(self, page: int = 0, pages: int = 1, *, area: int = 1) -> list[Pfn]:
        """The pfns."""
        flow = self.mirror.pin(Hva(page * PAGE), pages * PAGE, write=True, area=area, file=self.number)
        return [found.pfn for found in self.run(flow).pages]

    def charged(self) -> list[int]:
        """To the two processes and their user."""
        return [self.mm.locked.pages, self.heir.locked.pages, self.memory.locked.pages]


def test_a_pin_makes_the_pages_of_the_file_and_they_outlive_its_end() -> None:
    rig = MirroredFile()
    first, second = rig.pin_file(2, 2)
    rig.run(rig.file.pwrite(2 * PAGE, b"of the file"))
    assert rig.frame(first)[:11] == b"of the file"
    rig.run(rig.file.truncate(0))
    rig.file.put()
    assert rig.frame(first)[:11] == b"of the file"
    assert (rig.host.frames.in_use, rig.violations()) == (2, [])
    assert rig.run(rig.mirror.unpin(Hva(2 * PAGE), 2 * PAGE, area=1)) == 2
    assert second != first
    assert rig.host.frames.in_use == 0


def test_the_mirror_keeps_the_file_until_it_lets_go_of_it_or_ends() -> None:
    rig = MirroredFile()
    rig.run(rig.file.pwrite(0, b"kept"))
    rig.file.put()
    assert rig.host.frames.in_use == 1
    other = rig.mirror.open_file(rig.file)
    rig.mirror.files.close(other)
    assert rig.host.frames.in_use == 1
    assert errno_of(lambda: rig.mirror.files.close(other)) == errno.EINVAL
    assert errno_of(lambda: rig.run(rig.mirror.pin(Hva(0), PAGE, write=True, file=other))) == errno.EINVAL
    rig.run(rig.mirror.close())
    assert rig.host.frames.in_use == 0


def test_a_pin_beyond_the_end_is_refused_whole_and_one_without_a_process_is_not() -> None:
    rig = MirroredFile()
    assert errno_of(lambda: rig.pin_file(7, 2)) == errno.EINVAL
    assert errno_of(lambda: rig.pin_file(8)) == errno.EINVAL
    rig.run(rig.file.truncate(8 * PAGE - 1))  # a page that is not all there
    assert errno_of(lambda: rig.pin_file(7)) == errno.EINVAL
    assert rig.host.frames.in_use == 0
    rig.do(rig.mm.exit())
    assert len(rig.pin_file(0, 7)) == 7
    assert rig.violations() == []


def test_a_part_of_a_huge_page_is_pinned_by_its_first_byte() -> None:
    rig = MirroredFile(level=2)
    flow = rig.mirror.pin(Hva(MIB2 + PAGE), PAGE, write=True, area=1, file=rig.number)
    (page,) = rig.run(flow).pages
    assert (page.hva, page.level) == (MIB2, 2)
    assert (rig.charged(), rig.violations()) == ([512, 0, 0], [])
    assert rig.run(rig.mirror.unpin(Hva(MIB2 + PAGE), PAGE, area=1)) == 1


@pytest.mark.parametrize(
    ("account", "before", "after"), [("mm", [3, 0, 0], [0, 3, 0]), ("user", [0, 0, 3], [0, 0, 3])]
)
def test_a_process_takes_over_what_is_pinned_and_gives_it_back(
    account: str, before: list[int], after: list[int]
) -> None:
    rig = MirroredFile(account)
    rig.pin_file(0, 3)
    assert (rig.charged(), rig.mm.pinned_pages, rig.heir.pinned_pages) == (before, 3, 0)
    assert errno_of(lambda: rig.run(rig.mirror.undo_change_process())) == errno.EINVAL
    rig.run(rig.mirror.change_process(rig.heir))
    assert (rig.charged(), rig.mm.pinned_pages, rig.heir.pinned_pages) == (after, 0, 3)
    assert rig.violations() == []
    rig.pin_file(3)
    rig.heir.locked.limit = rig.mm.locked.limit = rig.memory.locked.limit = 4
    rig.mm.locked.charge(4)  # somebody took the room meanwhile: what is undone needs none
    rig.run(rig.mirror.undo_change_process())
    rig.mm.locked.uncharge(4)
    assert (rig.mm.pinned_pages, rig.heir.pinned_pages) == (4, 0)
    assert rig.violations() == []
    rig.run(rig.mirror.close())
    assert (rig.charged(), rig.heir.notifiers) == ([0, 0, 0], [])
    assert rig.mirror not in rig.mm.notifiers


@pytest.mark.parametrize(
    ("account", "room", "number"), [("mm", 2, errno.ENOMEM), ("mm", 3, 0), ("user", 5, 12), ("user", 6, 0)]
)
def test_without_room_nothing_is_taken_over(account: str, room: int, number: int) -> None:
    """A user pays twice for a moment: the new is charged before the old is let off [iommufd ioas.c]."""
    rig = MirroredFile(account)
    rig.pin_file(0, 3)
    rig.heir.locked.limit = rig.memory.locked.limit = room
    flow = rig.mirror.change_process(rig.heir)
    if number:
        before = rig.charged()
        assert errno_of(lambda: rig.run(flow)) == number
        assert (rig.charged(), rig.mm.pinned_pages, rig.mirror.mm) == (before, 3, rig.mm)
    else:
        rig.run(flow)
        assert rig.heir.pinned_pages == 3
    assert rig.violations() == []


def test_a_mirror_that_watches_or_ended_is_not_taken_over() -> None:
    rig = MirroredFile()
    rig.mirror.watch(rig.hva, PAGE)
    assert errno_of(lambda: rig.run(rig.mirror.change_process(rig.heir))) == errno.EINVAL
    rig.mirror.unwatch(rig.hva, PAGE)
    rig.pin()
    assert errno_of(lambda: rig.run(rig.mirror.change_process(rig.heir))) == errno.EINVAL
    rig.unpin()
    rig.run(rig.mirror.change_process(rig.heir))
    rig.mirror.watch(rig.hva, PAGE)
    assert errno_of(lambda: rig.run(rig.mirror.undo_change_process())) == errno.EINVAL
    rig.mirror.unwatch(rig.hva, PAGE)
    rig.run(rig.mirror.undo_change_process())
    rig.run(rig.mirror.close())
    assert errno_of(lambda: rig.run(rig.mirror.change_process(rig.heir))) == errno.EINVAL


def test_a_pin_that_sleeps_is_of_the_process_that_was_asked() -> None:
    """The heir would pay for a page that is not its own, and be asked whether a guest has others there."""
    rig = MirroredFile()
    uffd = Userfaultfd(rig.mm, user_mode_only=False)
    rig.run(uffd.register(rig.hva, PAGE, missing=True, wp=False))
    pin = rig.start(rig.mirror.pin(rig.hva, PAGE, write=True))
    rig.run(rig.mirror.change_process(rig.heir))
    rig.do(uffd.copy(rig.hva, bytes(PAGE), wp=False))
    assert errno_of(pin.result) == errno.EFAULT
    assert (rig.charged(), rig.violations()) == ([0, 0, 0], [])


@pytest.mark.parametrize("end", ["exit", "close"])
def test_a_process_that_exits_before_it_can_pay_does_not(end: str) -> None:
    """It waits for the mmap_lock while the heir exits, or the mirror ends."""
    rig = MirroredFile()
    rig.pin_file(0, 3)
    rig.run(rig.heir.mmap_lock.acquire(write=True))
    changed = rig.start(rig.mirror.change_process(rig.heir))
    if end == "exit":
        rig.heir.happens(MmEvent.EXIT)
    else:
        rig.run(rig.mirror.close())
    rig.heir.mmap_lock.release()
    rig.flows.run_ready()
    assert errno_of(changed.result) == (errno.EPERM if end == "exit" else errno.EINVAL)
    assert (rig.heir.locked.pages, rig.heir.pinned_pages, rig.heir.notifiers) == (0, 0, [])
    assert rig.mm.locked.pages == (3 if end == "exit" else 0)


def test_a_mirror_that_goes_back_while_a_large_range_goes_sees_none_of_it() -> None:
    """The clearing lets others have turns, and asks for the last time who is told before the first."""
    rig = MirroredFile()
    turn: Wait[None] = Wait()
    rig.host.cond_resched = lambda: turn
    pages = 2 * UNMAP_BATCH
    large = rig.map(pages)
    rig.run(rig.mm.write(large, bytes(pages * PAGE)))
    rig.run(rig.mirror.change_process(rig.heir))
    gone = rig.start(rig.mm.munmap(large, pages * PAGE))
    assert rig.mm.present_page(Hva(large + (pages - 1) * PAGE)) is not None, "some of it is still there"
    undone = rig.start(rig.mirror.undo_change_process())
    assert (gone.done, undone.done, rig.mirror.mm) == (False, False, rig.heir)
    turn.set(None)
    rig.flows.run_ready()
    assert (gone.done, undone.done, rig.mirror.mm) == (True, True, rig.mm)


@pytest.mark.parametrize("change", ["another", "watch", "close"])
def test_what_changed_before_it_is_undone_is_asked_again(change: str) -> None:
    rig = MirroredFile()
    rig.pin_file(0, 3)
    other = rig.host.create_mm()
    rig.run(rig.mirror.change_process(rig.heir))
    rig.run(rig.mm.mmap_lock.acquire(write=True))
    undone = rig.start(rig.mirror.undo_change_process())
    if change == "another":
        rig.run(rig.mirror.change_process(other))
    elif change == "watch":
        rig.mirror.watch(rig.hva, PAGE)
    else:
        rig.run(rig.mirror.close())
    rig.mm.mmap_lock.release()
    rig.flows.run_ready()
    assert errno_of(undone.result) == errno.EINVAL
    assert (rig.mm.pinned_pages, rig.mirror in rig.mm.notifiers, rig.violations()) == (0, False, [])


def test_a_process_that_exited_takes_back_what_it_paid_for() -> None:
    """Whoever undoes has failed elsewhere, and must find all as it was."""
    rig = MirroredFile()
    rig.pin_file(0, 3)
    rig.run(rig.mirror.change_process(rig.heir))
    rig.do(rig.mm.exit())
    rig.run(rig.mirror.undo_change_process())
    assert (rig.charged(), rig.mirror.mm, rig.violations()) == ([3, 0, 0], rig.mm, [])
    rig.run(rig.mirror.close())
    assert rig.charged() == [0, 0, 0]


def test_the_check_sees_a_process_that_does_not_pay() -> None:
    rig = MirroredFile()
    rig.pin_file(0, 3)
    rig.mm.notifiers.remove(rig.mirror)
    rig.heir.notifiers.append(rig.mirror)
    rig.mirror.mm = rig.heir  # a planted bug: taken over, and nobody was charged
    said = rig.violations()
    assert any(why.endswith("has 0 pages pinned, its mirrors 3") for why in said)
    assert any(why.endswith("the mirrors it pays for 3") for why in said)
