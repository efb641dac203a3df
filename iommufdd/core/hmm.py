"""The host's memory as an IOAS uses it: the pages of one process, and whether they went while it looked.

Models what a driver has of get_user_pages, hmm_range_fault and mmu_interval_notifier [mm hmm.c]: a port, and
`Lookups`, which is mmu_interval_read_begin and mmu_interval_read_retry with the ranges kept: what is found
may turn out larger than what was asked for.  Whoever looked asks `stale` and stores in the same turn (I5).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NewType, Protocol

from protocol.units import Hpa, Hva

UserFd = NewType("UserFd", int)  # of a caller, lent for the call: handed on, neither kept nor closed
Invalidate = Callable[[Hva, int], Coroutine[Any, Any, None]]  # start, size; its end is the ack

MIRROR_TRIES = 64  # to map what was found; each further one: the host took the page away meanwhile


class HmmPage(NamedTuple):
    """One page of the host, with its own size."""

    hva: Hva
    hpa: Hpa
    size: int
    writable: bool

    @property
    def end(self) -> Hva:
        return Hva(self.hva + self.size)

    def part(self, start: Hva, end: Hva) -> HmmPage:
        """What of it lies in start..end, which it meets."""
        first, last = max(start, self.hva), min(end, self.end)
        return HmmPage(first, Hpa(self.hpa + first - self.hva), last - first, self.writable)


class HmmRange(NamedTuple):
    """Pages in order, absent ones left out; what lies at `end` and beyond was not looked at.  `major`: how
    many were read back from swap.
    """

    pages: list[HmmPage]
    end: Hva
    major: int = 0


class HostPin(NamedTuple):
    """What the host has pinned: of one page, from the first byte that was asked for on."""

    hva: Hva
    hpa: Hpa
    size: int


class PinnedRange(NamedTuple):
    """Pins in order; what lies at `end` and beyond was not looked at; `total`: all there are, anywhere."""

    pins: list[HostPin]
    end: Hva
    total: int


class CallerMm(NamedTuple):
    """current->mm of who asks: `cookie` names the process, `fd` gets at it."""

    cookie: int
    fd: UserFd


class ProcessMemory(Protocol):
    """One process's.  Each call may raise UapiError: ENODEV: the host is gone; EPERM: the process is, which a
    pin takes for memory that is not there (EFAULT)."""

    @property
    def is_gone(self) -> bool:
        """From the turn on in which it hung up, before anybody is told."""

    async def watch(self, hva: Hva, size: int) -> None:
        """Invalidations of the range come from now on.  EEXIST: it overlaps another."""

    async def unwatch(self, hva: Hva, size: int) -> None: ...

    async def range_fault(self, hva: Hva, size: int, *, write: bool, fault: bool) -> HmmRange:
        """Have the pages of a watched range faulted in, or look.  EFAULT, EHWPOISON, ENOMEM."""

    async def pin(self, hva: Hva, size: int, *, write: bool, area: int, file: int = 0) -> HmmRange:
        """For what has that number, as many from the start as fit one answer; of a file, `hva` is an offset.
        ENOMEM: RLIMIT_MEMLOCK, or no memory; EFAULT; EINVAL: beyond the end of the file.
        """

    async def unpin(self, hva: Hva, size: int, *, area: int) -> None: ...

    async def pinned(self, hva: Hva, size: int, *, area: int) -> PinnedRange:
        """What is pinned there for what has that number."""

    async def open_file(self, fd: UserFd) -> int:
        """The number of a memfd, to pin pages of.  EINVAL: no memfd."""

    async def close_file(self, file: int) -> None: ...

    async def change_process(self, mm_fd: UserFd) -> None:
        """That process pays for all pins from now on.  ENOMEM: RLIMIT_MEMLOCK, and nothing has changed."""

    async def undo_change_process(self) -> None: ...

    def release(self) -> None:
        """Let go of the process; nothing is asked after that."""


class Lookup:
    """What was taken away since it began."""

    __slots__ = ("_gone",)

    def __init__(self) -> None:
        self._gone: list[tuple[Hva, Hva]] = []

    def invalidate(self, start: Hva, end: Hva) -> None:
        self._gone.append((start, end))

    def stale(self, start: Hva, end: Hva) -> bool:
        """Is something of hva range start..end not what was found any more?"""
        return any(first < end and start < last for first, last in self._gone)


class Lookups:
    """Those going on."""

    def __init__(self) -> None:
        self._going_on: dict[Lookup, None] = {}

    @contextmanager
    def begin(self) -> Iterator[Lookup]:
        lookup = Lookup()
        self._going_on[lookup] = None
        try:
            yield lookup
        finally:
            del self._going_on[lookup]

    def invalidate(self, start: Hva, end: Hva) -> None:
        for lookup in self._going_on:
            lookup.invalidate(start, end)
