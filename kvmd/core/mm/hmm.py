"""A mirror: one address space as an MMU outside of kvmd uses it, with pages pinned there or followed.

Models mmu_interval_notifier [mm mmu_notifier.c], hmm_range_fault [mm hmm.c] and get_user_pages with
FOLL_LONGTERM [mm gup.c] for one user of one process's memory, who is told over `MirrorOps`.

- I5 for it: a range is looked at in the turn in which the answer is given, while no change of it is in
  progress; the change that makes the answer stale is told after it, for both go the same way.  Changes count
  from their begin to their end whether or not the range was watched when they began.
- I6 for it: a change goes on once the range was acked.  What is pinned stays in its frame until it is
  unpinned or `close`, which is called when nobody walks for this mirror any more.

An MMU that marks no page as used has nothing to say when pages age: it is never young.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from enum import Enum, auto
from typing import Literal, NamedTuple, Protocol

from kvmd.core.lease import Lease
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.locked import LockedVm
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.open_files import OpenFiles
from kvmd.core.mm.page import MappedPage, Pte
from kvmd.core.mm.pins import PinnedPage, PinnedRun, PinsByArea
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.lifecycle import LifeCycle
from protocol.units import PAGE_SIZE, Hva, size_of_level

MAX_PAGES = 1024  # of one answer
MAX_LOOKS = 16 * MAX_PAGES  # at absent pages too, where nothing is faulted in
MAX_WATCHED = 1 << 16
LOOKUP_TRIES = 64  # of a fault whose page is taken away each time before it is looked at
PIN_BATCH = 512  # pages of 4 KiB pinned or unpinned before others get a turn

# Whose locked_vm pins count in [iommufd io_pagetable.h, IOPT_PAGES_ACCOUNT_*].
AccountMode = Literal["user", "mm"]


class MirrorOps(Protocol):
    """Who is told."""

    def invalidate(self, start: int, size: int, seq: int, /) -> Wait[None]:
        """start..start+size is about to change; the Wait is set once no translation of it is used."""


class FoundPages(NamedTuple):
    """Pages in order, absent ones left out; `end`: how far the answer goes; `major`: read back from swap."""

    pages: list[MappedPage]
    end: Hva
    major: int


class MirrorState(Enum):
    NEW = auto()
    REGISTERING = auto()  # waits for changes under way to end
    REGISTERED = auto()
    CLOSED = auto()


class MirrorEvent(Enum):
    REGISTER = auto()
    LISTED = auto()  # among the notifiers: from now on every change is told
    CLOSE = auto()


MIRROR_LIFE = LifeCycle(
    "mirror of a process",
    MirrorState.NEW,
    {
        (MirrorState.NEW, MirrorEvent.REGISTER): MirrorState.REGISTERING,
        (MirrorState.REGISTERING, MirrorEvent.LISTED): MirrorState.REGISTERED,
        (MirrorState.NEW, MirrorEvent.CLOSE): MirrorState.CLOSED,
        (MirrorState.REGISTERING, MirrorEvent.CLOSE): MirrorState.CLOSED,
        (MirrorState.REGISTERED, MirrorEvent.CLOSE): MirrorState.CLOSED,
    },
)


class Mirror:
    """An MmuNotifier of `mm`."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.seq = 0  # of invalidations told
        self.account: AccountMode = "user"
        self._state = MIRROR_LIFE.born
        self._ops: MirrorOps | None = None
        self._lease: Lease | None = None
        self._watched: list[tuple[Hva, Hva]] = []  # in order, apart
        self._changing: list[tuple[Hva, Hva]] = []
        self._over: Wait[None] = Wait()  # set when the next change is over
        self.files = OpenFiles()
        self._paid_before: Mm | None = None  # whom `change_process` took the pins from
        self.pins = PinsByArea()

    # -- the notifier ----------------------------------------------------------------------------------

    async def register(self, ops: MirrorOps, lease: Lease, account: AccountMode = "user") -> None:
        """`lease`: it is told of changes, and has its pins, until that ends; `account`: who pays for them.
        No change that is half made is missed: it holds the mmap_lock, or tells us too.  EBUSY; EPERM.
        """
        if self._state is not MirrorState.NEW:
            raise UapiError(errno.EBUSY, "this mirror is registered already")
        self._check_alive()
        self._happens(MirrorEvent.REGISTER)
        # await: asked: the process may exit, or the mirror close; asked again: with the lock held
        # (tests/unit/kvmd/mm/test_hmm.py::test_a_process_gone_before_its_turn_is_eperm,
        # tests/unit/kvmd/mm/test_hmm.py::test_a_mirror_closed_before_its_turn_is_no_notifier)
        # | account, lease, ops: cannot change: the caller's own
        async with self.mm.mmap_lock:
            self._check_alive()
            if not MIRROR_LIFE.permits(self._state, MirrorEvent.LISTED):
                raise UapiError(errno.ENODEV, "the mirror was closed before it was registered")
            self.mm.notifiers.append(self)
            self.mm.claims.mapped.append(self.maps)
            self._ops, self._lease, self.account = ops, lease, account
            self._happens(MirrorEvent.LISTED)

    def _happens(self, event: MirrorEvent) -> None:
        self._state = MIRROR_LIFE.after(self._state, event)

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Told at once, however many of the watched ranges the change meets."""
        self._changing.append((start, end))
        met = self._watched[self._first(start) : self._first_from(end)]
        if met and self._ops is not None:
            first, last = max(start, met[0][0]), min(end, met[-1][1])
            self.seq += 1
            self.mm.memory.counters.hmm_invalidations += 1
            await self._ops.invalidate(first, last - first, self.seq)

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self._changing.remove((start, end))
        over, self._over = self._over, Wait()
        over.set(None)

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        return False

    def _is_changing(self, start: Hva, end: Hva) -> bool:
        return any(first < end and start < last for first, last in self._changing)

    # -- watched ranges --------------------------------------------------------------------------------

    def watch(self, start: Hva, size: int) -> None:
        """EEXIST: overlaps another; EBUSY: a guest's memory there is private; ENOMEM: too many."""
        self._check()
        end = Hva(start + size)
        if self._watched[self._first(start) : self._first_from(end)]:
            raise UapiError(errno.EEXIST, f"watch of {start:#x}..{end:#x}: it overlaps a watched range")
        self.mm.claims.check_mapping(start, end)
        if len(self._watched) >= MAX_WATCHED:
            raise UapiError(errno.ENOMEM, f"watch of {start:#x}..{end:#x}: {MAX_WATCHED} ranges are watched")
        insort(self._watched, (start, end))

    def unwatch(self, start: Hva, size: int) -> None:
        """Of a change told before, the ack is awaited all the same.  ENOENT."""
        self._check_registered()
        watched = start, Hva(start + size)
        if watched not in self._watched[self._first(start) : self._first(start) + 1]:
            raise UapiError(errno.ENOENT, f"unwatch of {start:#x}+{size:#x}: no range was watched like that")
        self._watched.remove(watched)

    def _first(self, start: Hva) -> int:
        """Of the watched ranges, the first that ends behind `start`."""
        at = bisect_left(self._watched, (start, start))
        return at - 1 if at and self._watched[at - 1][1] > start else at

    def _first_from(self, end: Hva) -> int:
        """Of the watched ranges, the first that begins at `end` or behind."""
        return bisect_left(self._watched, (end, end))

    def maps(self, start: Hva, end: Hva) -> bool:
        """Does it map a page of start..end, or may it at any time?  What it pins in a file by offset its
        pages tell (`AddressSpace.shows_pinned`).
        """
        return bool(self._watched[self._first(start) : self._first_from(end)]) or any(
            at < end and start < at + pinned.size and not pinned.by_offset for at, pinned in self.pins
        )

    # -- looking, faulting -----------------------------------------------------------------------------

    async def range_fault(self, start: Hva, size: int, *, write: bool, fault: bool = True) -> FoundPages:
        """What start..start+size is now; if `fault`, its first page faulted in, for a write if `write`, and
        with it what follows.  Nothing may await between this and its answer.  EINVAL: not watched; EFAULT,
        EHWPOISON, ENOMEM: of a fault; EBUSY: it was taken away again and again; EPERM.
        """
        end, tally = Hva(start + size), FaultCounts()
        counters = self.mm.memory.counters
        counters.hmm_faults += fault
        for _ in range(LOOKUP_TRIES):
            # await: end, counters, tally: cannot change: a number, and counts that are added to afresh
            await self._settled(start, end)
            if not fault:
                return FoundPages(*self._look(start, end), 0)
            # await: end, counters, tally: the page that was faulted in may go, what was settled may change;
            # asked again: `_settled`, `_serving`
            # (tests/unit/kvmd/mm/test_hmm.py::test_a_page_that_changed_while_another_slept_is_not_answered,
            # tests/unit/kvmd/mm/test_hmm.py::test_a_range_unwatched_while_its_fault_slept_is_einval)
            await self._fault_in(start, end, write=write, tally=tally)
            # await: end, counters, tally: cannot change: the same
            await self._settled(start, end)
            pages, stopped = self._serving(start, end, write=write)
            if pages:
                counters.hmm_faults_major += tally.major
                counters.hmm_faults_allocated += tally.allocated
                return FoundPages(pages, stopped, tally.major)
        raise UapiError(errno.EBUSY, f"fault at {start:#x}: its page was taken away {LOOKUP_TRIES} times")

    async def _settled(self, start: Hva, end: Hva) -> None:
        """No change of the range is in progress, and the next will be told [mmu_interval_read_begin]."""
        self._check()
        while self._is_changing(start, end):
            await self._over
            self._check()
        at = self._first(start)
        if not (at < len(self._watched) and self._watched[at][0] <= start and end <= self._watched[at][1]):
            raise UapiError(errno.EINVAL, f"fault at {start:#x}..{end:#x}: not in a watched range")

    async def _fault_in(self, start: Hva, end: Hva, *, write: bool, tally: FaultCounts) -> None:
        """The first page somebody waits for; those behind it are a guess, for which the last frames are not
        taken.
        """
        for _ in range(MAX_PAGES):
            # await: tally: cannot change: the caller's own
            page = await self.mm.get_user_page(start, write=write, tally=tally)
            start = _end_of(page)
            if start >= end or self.mm.memory.is_low:
                return

    def _serving(self, start: Hva, end: Hva, *, write: bool) -> tuple[list[MappedPage], Hva]:
        """Pages from `start` on without a gap, as far as they serve."""
        pages: list[MappedPage] = []
        while start < end and len(pages) < MAX_PAGES:
            page = self.mm.present_page(start)
            if page is None or (write and not page.writable):
                break
            pages.append(page)
            start = _end_of(page)
        return pages, min(start, end)

    def _look(self, start: Hva, end: Hva) -> tuple[list[MappedPage], Hva]:
        pages: list[MappedPage] = []
        looks = 0
        while start < end and len(pages) < MAX_PAGES and looks < MAX_LOOKS:
            looks += 1
            page = self.mm.present_page(start)
            if page is not None:
                pages.append(page)
            start = Hva(start + PAGE_SIZE) if page is None else _end_of(page)
        return pages, min(start, end)

    # -- pins ------------------------------------------------------------------------------------------

    @property
    def payer(self) -> LockedVm:
        """Where its pins count against RLIMIT_MEMLOCK."""
        return self._payer_of(self.mm)

    def _payer_of(self, mm: Mm) -> LockedVm:
        return mm.locked if self.account == "mm" else mm.memory.locked

    async def pin(self, start: Hva, size: int, *, write: bool, area: int = 0, file: int = 0) -> FoundPages:
        """Pin for long, up to MAX_PAGES; `area`: the caller's name for what these pins belong to; `file`:
        where `start` is an offset.  A failure leaves none of this call.  ENOMEM, EHWPOISON; EBUSY: a guest's
        memory there is private; EFAULT, as for an address without memory: the process is gone [iommufd
        pages.c]; EINVAL: beyond the end of the file.
        """
        end, at, tally = Hva(start + size), start, FaultCounts()
        done: list[tuple[Hva, PinnedPage]] = []
        pages: list[MappedPage] = []
        turn = 0
        try:
            while at < end and len(pages) < MAX_PAGES:
                if file:
                    self._check_registered()  # it takes no process
                    entry = self.files.page(file, at, end)
                else:
                    # await: at, end, pages, tally, turn: the mirror may be closed; asked again: `_check`
                    # (tests/unit/kvmd/mm/test_hmm_pins.py::test_a_pin_asleep_while_its_mirror_closes) | done:
                    # a pin of it may be given back; asked again: `_take_back`
                    # (tests/unit/kvmd/mm/test_hmm_pins.py::test_a_pin_that_fails_takes_back_its_own)
                    entry = await self._page_to_pin(at, end, write=write, tally=tally)
                done.append((at, self._pin(area, at, entry, min(_end_of(entry), end) - at, bool(file))))
                pages.append(entry)
                turn += done[-1][1].npages
                if turn >= PIN_BATCH:
                    turn = 0
                    # await: done: a pin of it may be given back; asked again: `_take_back`
                    # (tests/unit/kvmd/mm/test_hmm_pins.py::test_a_pin_that_fails_takes_back_its_own) | end,
                    # entry, pages, tally, turn: cannot change: numbers and our own lists, whose pages are
                    # pinned
                    await self.mm.memory.cond_resched()
                at = _end_of(entry)
        except UapiError:
            for first, pinned in done:
                self._take_back(area, first, pinned)
            raise
        self.mm.memory.counters.hmm_faults_major += tally.major
        return FoundPages(pages, min(at, end), tally.major)

    async def _page_to_pin(self, at: Hva, end: Hva, *, write: bool, tally: FaultCounts) -> Pte:
        self._check(errno.EFAULT)
        mm = self.mm
        # await: mm: another may take over; asked again: below
        # (tests/unit/kvmd/mm/test_hmm_files.py::test_a_pin_that_sleeps_is_of_the_process_that_was_asked)
        entry = await self.mm.fault_to_pin(at, write=write, tally=tally)
        self._check(errno.EFAULT)
        if self.mm is not mm:
            raise UapiError(errno.EFAULT, f"pin of {at:#x}: this is not the mirror of mm {mm.id} any more")
        self.mm.claims.check_mapping(at, min(_end_of(entry), end))
        return entry

    def _pin(self, area: int, at: Hva, entry: Pte, size: int, by_offset: bool) -> PinnedPage:
        pinned = PinnedPage(entry.page, entry.pfn, entry.level, size, by_offset)
        self.mm.pin(entry.page, pinned.npages, self.payer)
        self.pins.add(area, at, pinned)
        return pinned

    async def unpin(self, start: Hva, size: int, *, area: int = 0) -> int:
        """Take one pin of `area` back from each page, found by the first byte of it that was asked for; how
        many there were.  It works after the process's exit too."""
        self._check_registered()
        return await self._unpin(area, start, Hva(start + size))

    async def _unpin(self, area: int, start: Hva, end: Hva) -> int:
        count = turn = 0
        for at in self.pins.within(area, start, end):
            held = self.pins.last(area, at)
            if held is None:
                continue  # gone while others had a turn
            self._take_back(area, at, held)
            count += 1
            turn += held.npages
            if turn >= PIN_BATCH:
                turn = 0
                # await: each at, turn: its pins may be given back by another; asked again: `held`
                # (tests/unit/kvmd/mm/test_hmm_pins.py::test_two_unpins_at_once_take_each_pin_once)
                await self.mm.memory.cond_resched()
        return count

    def _take_back(self, area: int, at: Hva, pinned: PinnedPage) -> None:
        """The pin goes, unless it is gone."""
        if self.pins.remove(area, at, pinned):
            self.mm.unpin(pinned.page, pinned.npages, self.payer)

    # -- files, and who pays ---------------------------------------------------------------------------

    def open_file(self, file: MemoryFile) -> int:
        """To pin pages of; its number in `files`."""
        self._check_registered()
        return self.files.open(file)

    async def change_process(self, mm: Mm) -> None:
        """`mm` pays for all that is pinned, from now on, and is whose mirror this is; the old one pays no
        more [iommufd ioas.c, iommufd_ioas_change_process].  The new is charged first: where both are one user
        there must be room for both.  ENOMEM: RLIMIT_MEMLOCK; EPERM: it has exited; EINVAL: memory is watched
        or pinned by its address.
        """
        self._check_registered()
        # await: mm: it may exit, this be closed; asked again: below
        # (tests/unit/kvmd/mm/test_hmm_files.py::test_a_process_that_exits_before_it_can_pay_does_not)
        async with mm.mmap_lock:
            self._check_registered()
            self._check_files_alone()
            if not mm.alive:
                raise UapiError(errno.EPERM, f"mm {mm.id}: the process has exited")
            npages = sum(pinned.npages for _, pinned in self.pins)
            self._payer_of(mm).charge(npages)
            self._pay_with(mm, npages)

    async def undo_change_process(self) -> None:
        """As it was before, whatever the limit is now, and though that process has exited: pins outlive it.
        EINVAL: as of `change_process`; nothing to undo.
        """
        before = self._paid_before
        if before is None:
            raise UapiError(errno.EINVAL, "this mirror was always of the process it is of")
        # await: before, asked: another may take over, this be closed; asked again: below
        # (tests/unit/kvmd/mm/test_hmm_files.py::test_what_changed_before_it_is_undone_is_asked_again)
        async with before.mmap_lock:
            self._check_registered()
            self._check_files_alone()
            if self._paid_before is not before:
                raise UapiError(errno.EINVAL, f"mm {before.id}: it is not who paid before any more")
            npages = sum(pinned.npages for _, pinned in self.pins)
            self._payer_of(before).pages += npages
            self._pay_with(before, npages)

    def _check_files_alone(self) -> None:
        if self._watched or not all(pinned.by_offset for _, pinned in self.pins):
            raise UapiError(
                errno.EINVAL,
                "addresses are of one process: the mirror that watches or pins some stays its own",
            )

    def _pay_with(self, mm: Mm, npages: int) -> None:
        """`mm` is charged already, and its mmap_lock held: of a change that is half made who comes now would
        not be told."""
        self.payer.uncharge(npages)
        self.mm.pinned_pages -= npages
        mm.pinned_pages += npages
        self.mm.notifiers.remove(self)
        mm.notifiers.append(self)
        self.mm.claims.mapped.remove(self.maps)
        mm.claims.mapped.append(self.maps)
        self.mm, self._paid_before = mm, self.mm

    # -- ends ------------------------------------------------------------------------------------------

    async def release(self) -> None:
        """Its channel is closed.  Until its lease ends something may walk on its behalf: it is told of
        changes, and has its pins (I13)."""
        if self._lease is not None:
            await self._lease.ended
        await self.close()

    async def close(self) -> None:
        """Nobody walks for it any more: told of nothing, and nothing is pinned, when this returns."""
        was_listed = self._state is MirrorState.REGISTERED
        self._happens(MirrorEvent.CLOSE)
        if was_listed:
            self.mm.notifiers.remove(self)
            self.mm.claims.mapped.remove(self.maps)
        while self.pins:
            await self._unpin(*self.pins.some_area())
        self.files.close_all()

    def _check(self, gone: int = errno.EPERM) -> None:
        """EINVAL: not registered; `gone`: the process is."""
        self._check_registered()
        self._check_alive(gone)

    def _check_registered(self) -> None:
        if self._state is not MirrorState.REGISTERED:
            raise UapiError(errno.EINVAL, "a mirror must be registered first: its pins end with its lease")

    def _check_alive(self, gone: int = errno.EPERM) -> None:
        if not self.mm.alive:
            raise UapiError(gone, f"mm {self.mm.id}: the process has exited")

    # -- what must hold --------------------------------------------------------------------------------

    def pinned_in(self, start: Hva, size: int, *, area: int) -> tuple[list[PinnedRun], Hva]:
        """What `area` has pinned there, in order, up to MAX_PAGES, and where that stopped."""
        self._check_registered()
        return self.pins.runs(area, start, Hva(start + size), MAX_PAGES, MAX_LOOKS)


def _end_of(page: MappedPage) -> Hva:
    return Hva(page.hva + size_of_level(page.level))
