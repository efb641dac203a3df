"""The device TLB: translations a function holds, so that its DMA goes out translated.

Models an address translation cache [PCIe 10.1]: filled by successful translation completions, dropped by
invalidation requests, never by a page response.  Reads and writes are cached apart, so that a hit is one
look-up: an entry with both rights stands in both.  `runs` turns a range into pieces of host memory, joined
where neighbouring pages happen to be neighbours in the host too.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocol.pt import bits
from protocol.pt.geometry import ENTRIES, INDEX_BITS
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, PAGE_SHIFT, Level

MAX_ENTRIES = 8192  # of one page size and right; the oldest goes first
_BLOCK_SHIFT = PAGE_SHIFT + INDEX_BITS
_BLOCK_MASK = (1 << _BLOCK_SHIFT) - 1
Run = tuple[int, int]  # (hpa, bytes)


class _Block:
    """512 neighbouring 4 KiB pages: what to add to an iova in each, so that a range of them is a slice."""

    __slots__ = ("deltas", "held")

    def __init__(self) -> None:
        self.deltas: list[int | None] = [None] * ENTRIES
        self.held = 0


class DevTlb:
    def __init__(self) -> None:
        self.hits = 0  # pages of DMA that went out translated
        self.misses = 0  # translation requests
        # [write][level]: page of that size -> what to add to an iova in it for the hpa; the oldest first
        self._pages: tuple[dict[Level, dict[int, int]], ...] = (_by_level(), _by_level())
        self._blocks: tuple[dict[int, _Block], ...] = ({}, {})  # [write]: the 4 KiB pages again, by 2 MiB
        self._tags: dict[tuple[Level, int], int] = {}
        self._huge = False

    def fill(self, page: int, hpa: int, level: Level, rights: int, tag: int | None) -> None:
        """Cache what a completion granted: the whole leaf of `level` that covers 4 KiB page `page`."""
        key = page >> INDEX_BITS * (level - 1)
        delta = hpa - (key << PAGE_SHIFT + INDEX_BITS * (level - 1))
        for write, need in ((False, bits.READ), (True, bits.WRITE)):
            if rights & need:
                cache = self._pages[write][level]
                if len(cache) >= MAX_ENTRIES:
                    self._forget(write, level, next(iter(cache)))
                if level == LEVEL_4K:
                    self._fill_block(write, key, delta, known=key in cache)
                cache[key] = delta
        self._huge |= level > LEVEL_4K
        if tag is not None:
            self._tags[level, key] = tag

    def _fill_block(self, write: bool, page: int, delta: int, *, known: bool) -> None:
        block = self._blocks[write].get(page >> INDEX_BITS)
        if block is None:
            block = self._blocks[write][page >> INDEX_BITS] = _Block()
        block.deltas[page & ENTRIES - 1] = delta
        block.held += not known

    def _forget(self, write: bool, level: Level, key: int) -> None:
        if self._pages[write][level].pop(key, None) is None or level > LEVEL_4K:
            return
        block = self._blocks[write][key >> INDEX_BITS]
        block.deltas[key & ENTRIES - 1] = None
        block.held -= 1
        if not block.held:
            del self._blocks[write][key >> INDEX_BITS]

    def runs(self, iova: int, size: int, write: bool) -> tuple[list[Run], int]:
        """Where the first bytes of iova..iova+size lie, as far as all pages are cached, and how many
        bytes.
        """
        found: list[Run] = []
        at, end = iova, iova + size
        while at < end:
            if self._huge:
                run = self._huge_run(self._pages[write], at, end)
                if run is not None:
                    found.append(run)
                    at += run[1]
                    continue
            stop = (at | _BLOCK_MASK) + 1  # the next huge leaf, or block, may begin there
            if stop > end:
                stop = end
            reached = self._small_runs(write, at, stop, found)
            if reached < stop:
                return found, reached - iova
            at = stop
        return found, size

    def _huge_run(self, pages: dict[Level, dict[int, int]], at: int, end: int) -> Run | None:
        for level in (LEVEL_2M, LEVEL_1G):
            shift = PAGE_SHIFT + INDEX_BITS * (level - 1)
            delta = pages[level].get(at >> shift)
            if delta is not None:
                return at + delta, min(end - at, (1 << shift) - (at & (1 << shift) - 1))
        return None

    def _small_runs(self, write: bool, at: int, end: int, found: list[Run]) -> int:
        """Append what 4 KiB entries of one block give for at..end; where the first page without one begins,
        or `end`.
        """
        block = self._blocks[write].get(at >> _BLOCK_SHIFT)
        if block is None:
            return at
        first, last = at >> PAGE_SHIFT, end - 1 >> PAGE_SHIFT
        deltas = block.deltas[first & ENTRIES - 1 : (last & ENTRIES - 1) + 1]
        delta = deltas[0]
        if deltas.count(delta) < len(deltas):
            for page, following in enumerate(deltas, first):
                if following != delta:
                    if delta is None:
                        return at
                    stop = page << PAGE_SHIFT
                    self._append(found, at + delta, stop - at)
                    at, delta = stop, following
        if delta is None:
            return at
        if found:
            self._append(found, at + delta, end - at)
        else:
            found.append((at + delta, end - at))
        return end

    def _append(self, found: list[Run], hpa: int, size: int) -> None:
        """One more run, or the last one longer: blocks end where no huge leaf does."""
        if found and not self._huge and found[-1][0] + found[-1][1] == hpa:
            hpa, size = found[-1][0], found.pop()[1] + size
        found.append((hpa, size))

    def tag_of(self, page: int, write: bool) -> tuple[int, int] | None:
        """(debug) the frame that 4 KiB page `page` is cached as, and its tag when it was walked."""
        for level in (LEVEL_4K, LEVEL_2M, LEVEL_1G):
            shift = INDEX_BITS * (level - 1)
            delta = self._pages[write][level].get(page >> shift)
            if delta is not None:
                return page + (delta >> PAGE_SHIFT), self._tags[level, page >> shift]
        return None

    def invalidate(self, start: int, npages: int) -> None:
        """Drop what translates pages start..start+npages."""
        for write, caches in ((False, self._pages[False]), (True, self._pages[True])):
            for level, cache in caches.items():
                shift = INDEX_BITS * (level - 1)
                first, last = start >> shift, (start + npages - 1) >> shift
                if last - first >= len(cache):
                    keys = [key for key in cache if first <= key <= last]
                else:
                    keys = [key for key in range(first, last + 1) if key in cache]
                for key in keys:
                    self._forget(write, level, key)

    def entries(self) -> Iterator[tuple[int, int, Level, bool]]:
        """(first page, hpa, level, write) of everything cached: for checks."""
        for write, caches in enumerate(self._pages):
            for level, cache in caches.items():
                for key, delta in cache.items():
                    page = key << INDEX_BITS * (level - 1)
                    yield page, (page << PAGE_SHIFT) + delta, level, bool(write)


def _by_level() -> dict[Level, dict[int, int]]:
    return {LEVEL_4K: {}, LEVEL_2M: {}, LEVEL_1G: {}}
