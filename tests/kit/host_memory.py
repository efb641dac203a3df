"""The host's memory of one process as an IOAS sees it: a dict of pages, answers that take their time.

A change goes as in kvmd: told first, made when the answer is there, over.  What was asked for meanwhile
waits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

from iommufdd.core.hmm import HmmPage, HmmRange, HostPin, PinnedRange
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import PAGE_SIZE, Hpa, Hva

FRAMES = 0x1_0000_0000
MAX_PAGES = 64  # of one answer


class FakeHost:
    def __init__(self, log: list[Any] | None = None) -> None:
        self.pages: dict[int, HmmPage] = {}  # by the address of their first byte
        self.watched: list[tuple[int, int]] = []
        self.pins: dict[tuple[int, int], list[HmmPage]] = {}  # (area, first byte of the page asked for)
        self.log = [] if log is None else log
        self.errno = 0
        self.hole = -1  # nothing can be faulted in there
        self.room: int | None = None  # pages that may be pinned
        self.page_size = PAGE_SIZE  # of what is faulted in
        self.major = 0
        self.writable = True
        self.hop: Callable[[], Coroutine[Any, None, None]] = _nothing  # what a message takes
        self.told: Callable[[Hva, int], Coroutine[Any, None, None]] | None = None
        self.released = False
        self.is_gone = False
        self._changing: list[tuple[int, int]] = []
        self._over: Wait[None] = Wait()
        self._next_frame = FRAMES

    # -- what the process and the host do ---------------------------------------------------------------

    def page_at(self, hva: int) -> HmmPage | None:
        for size in (PAGE_SIZE, 2 << 20, 1 << 30):
            page = self.pages.get(hva & -size)
            if page is not None and hva < page.end:
                return page
        return None

    def fault_in(self, hva: int) -> HmmPage:
        page = self.page_at(hva)
        if page is None:
            first = hva & -self.page_size
            self._next_frame += -self._next_frame % self.page_size
            page = HmmPage(Hva(first), Hpa(self._next_frame), self.page_size, self.writable)
            self._next_frame += self.page_size
            self.pages[first] = page
        return page

    def frame_of(self, hva: int) -> int | None:
        page = self.page_at(hva)
        return None if page is None else page.hpa + hva - page.hva

    async def change(self, start: int, end: int, edit: Callable[[], None]) -> None:
        self._changing.append((start, end))
        if self.told is not None and any(first < end and start < last for first, last in self.watched):
            await self.told(Hva(start), end - start)
        edit()
        self._changing.remove((start, end))
        over, self._over = self._over, Wait()
        over.set(None)

    async def give_up(self, start: int, end: int) -> None:
        """As MADV_DONTNEED: a huge page loses a part by being split, and is told of as a whole; again if one
        came up meanwhile.
        """
        while self._whole(start, end) != (start, end) or self.pages_in(start, end):
            low, high = self._whole(start, end)

            def edit(low: int = low, high: int = high) -> None:
                if self._whole(start, end) == (low, high):
                    self.remove(start, end)

            await self.change(low, high, edit)

    def pages_in(self, start: int, end: int) -> list[HmmPage]:
        return [page for page in self.pages.values() if page.hva < end and start < page.end]

    def _whole(self, start: int, end: int) -> tuple[int, int]:
        met = self.pages_in(start, end)
        return min([start, *(page.hva for page in met)]), max([end, *(page.end for page in met)])

    def remove(self, start: int, end: int) -> None:
        for page in self.pages_in(start, end):
            del self.pages[page.hva]
            for hva in range(page.hva, page.end, PAGE_SIZE):
                if not start <= hva < end:
                    part = HmmPage(Hva(hva), Hpa(page.hpa + hva - page.hva), PAGE_SIZE, page.writable)
                    self.pages[hva] = part

    def is_changing(self, start: int, end: int) -> bool:
        return any(first < end and start < last for first, last in self._changing)

    # -- the port ------------------------------------------------------------------------------------------

    async def watch(self, hva: int, size: int) -> None:
        await self._asked("watch", hva, size)
        if any(first < hva + size and hva < last for first, last in self.watched):
            raise UapiError(errno.EEXIST, "watched already")
        self.watched.append((hva, hva + size))

    async def unwatch(self, hva: int, size: int) -> None:
        await self._asked("unwatch", hva, size)
        self.watched.remove((hva, hva + size))

    async def range_fault(self, hva: int, size: int, *, write: bool, fault: bool) -> HmmRange:
        await self._asked("fault" if fault else "look", hva, size)
        while self.is_changing(hva, hva + size):
            await self._over
        if fault and hva <= self.hole < hva + size:
            raise UapiError(errno.EFAULT, f"nothing at {self.hole:#x}")
        found = self._find(hva, size, fault=fault)
        await self.hop()
        return found

    async def pin(self, hva: int, size: int, *, write: bool, area: int, file: int = 0) -> HmmRange:
        await self._asked("pin", hva, size)
        found = self._find(hva, size, fault=True)
        if self.room is not None:
            wanted = found.end - hva >> 12
            if wanted > self.room:
                raise UapiError(errno.ENOMEM, "RLIMIT_MEMLOCK")
            self.room -= wanted
        for page in found.pages:
            self.pins.setdefault((area, max(hva, page.hva)), []).append(page)
        await self.hop()
        return found

    async def unpin(self, hva: int, size: int, *, area: int) -> None:
        self.log.append(("unpin", hva, size))
        await self.hop()
        for key in [key for key in self.pins if key[0] == area and hva <= key[1] < hva + size]:
            self.pins[key].pop()
            if not self.pins[key]:
                del self.pins[key]
        if self.room is not None:
            self.room += size >> 12

    async def pinned(self, hva: int, size: int, *, area: int) -> PinnedRange:
        await self.hop()
        found = [
            HostPin(Hva(at), Hpa(page.hpa + at - page.hva), page.end - at)
            for (name, at), pages in sorted(self.pins.items(), key=lambda item: item[0])
            if name == area and hva <= at < hva + size
            for page in pages
        ]
        return PinnedRange(found, Hva(hva + size), sum(map(len, self.pins.values())))

    async def open_file(self, fd: int) -> int:
        await self._asked("open_file", fd)
        return fd

    async def close_file(self, file: int) -> None:
        self.log.append(("close_file", file))

    async def change_process(self, mm_fd: int) -> None:
        await self._asked("change_process", mm_fd)

    async def undo_change_process(self) -> None:
        self.log.append(("undo_change_process",))

    def release(self) -> None:
        self.released = True

    def _find(self, hva: int, size: int, *, fault: bool) -> HmmRange:
        pages: list[HmmPage] = []
        end = hva + size
        while hva < end and len(pages) < MAX_PAGES:
            page = self.fault_in(hva) if fault else self.page_at(hva)
            if page is not None:
                pages.append(page)
            hva = hva + PAGE_SIZE if page is None else page.end
        return HmmRange(pages, Hva(min(hva, end)), self.major)

    async def _asked(self, *what: Any) -> None:
        self.log.append(what)
        await self.hop()
        if self.errno:
            raise UapiError(self.errno, "the host says no")


async def _nothing() -> None: ...
