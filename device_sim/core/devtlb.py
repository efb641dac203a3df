"""The device TLB: translations a function holds, so that its DMA goes out translated.

Models an address translation cache [PCIe 10.1]: filled by successful translation completions, dropped by
invalidation requests, never by a page response.  Reads and writes are cached apart, so that a hit is one
look-up: an entry with both rights stands in both.  `runs` turns a range into pieces of host memory, joined
where neighbouring pages happen to be neighbours in the host too.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocol.pt import bits
from protocol.pt.geometry import INDEX_BITS
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, Level

MAX_ENTRIES = 8192  # of one page size and right; the oldest goes first
Run = tuple[int, int]  # (hpa, bytes)


class DevTlb:
    def __init__(self) -> None:
        self.hits = 0  # pages of DMA that went out translated
        self.misses = 0  # translation requests
        # [write][level]: page of that size -> hpa of its first byte
        self._pages: tuple[dict[Level, dict[int, int]], ...] = (_by_level(), _by_level())
        self._tags: dict[tuple[Level, int], int] = {}
        self._huge = False

    def fill(self, page: int, hpa: int, level: Level, rights: int, tag: int | None) -> None:
        """Cache what a completion granted: the whole leaf of `level` that covers 4 KiB page `page`."""
        key = page >> INDEX_BITS * (level - 1)
        for write, need in ((False, bits.READ), (True, bits.WRITE)):
            if rights & need:
                cache = self._pages[write][level]
                if len(cache) >= MAX_ENTRIES:
                    del cache[next(iter(cache))]
                cache[key] = hpa
        self._huge |= level > LEVEL_4K
        if tag is not None:
            self._tags[level, key] = tag

    def runs(self, iova: int, size: int, write: bool) -> tuple[list[Run], int]:
        """Where the first bytes of iova..iova+size lie, as far as all pages are cached, and how many
        bytes.
        """
        found: list[Run] = []
        pages = self._pages[write]
        at, end = iova, iova + size
        while at < end:
            stop = end
            if self._huge:
                run = self._huge_run(pages, at, end)
                if run is not None:
                    found.append(run)
                    at += run[1]
                    continue
                stop = min(
                    end, (at | (PAGE_SIZE << INDEX_BITS) - 1) + 1
                )  # the next huge leaf may begin there
            reached = self._small_runs(pages[LEVEL_4K], at, stop, found)
            if reached < stop:
                return found, reached - iova
            at = stop
        return found, size

    def _huge_run(self, pages: dict[Level, dict[int, int]], at: int, end: int) -> Run | None:
        for level in (LEVEL_2M, LEVEL_1G):
            shift = PAGE_SHIFT + INDEX_BITS * (level - 1)
            hpa = pages[level].get(at >> shift)
            if hpa is not None:
                offset = at & (1 << shift) - 1
                return hpa + offset, min(end - at, (1 << shift) - offset)
        return None

    def _small_runs(self, cache: dict[int, int], at: int, end: int, found: list[Run]) -> int:
        """Append what 4 KiB entries give for at..end; where the first page without one begins, or `end`."""
        get = cache.get
        first = at >> PAGE_SHIFT
        frames = [get(page) for page in range(first, (end - 1 >> PAGE_SHIFT) + 1)]
        if None in frames:
            del frames[frames.index(None) :]
            if not frames:
                return at
            end = (first + len(frames)) << PAGE_SHIFT
        offset = at & PAGE_OFFSET_MASK
        start, count = frames[0], len(frames)
        assert start is not None
        if frames == list(range(start, start + count * PAGE_SIZE, PAGE_SIZE)):  # one piece of host memory
            found.append((start + offset, end - at))
            return end
        hpa, size = start + offset, PAGE_SIZE - offset
        for frame in frames[1:]:
            if frame == hpa + size:
                size += PAGE_SIZE
            else:
                found.append((hpa, size))
                assert frame is not None
                hpa, size = frame, PAGE_SIZE
        found.append((hpa, size - (((first + count) << PAGE_SHIFT) - end)))
        return end

    def tag_of(self, page: int, write: bool) -> tuple[int, int] | None:
        """(debug) the frame that 4 KiB page `page` is cached as, and its tag when it was walked."""
        for level in (LEVEL_4K, LEVEL_2M, LEVEL_1G):
            shift = INDEX_BITS * (level - 1)
            hpa = self._pages[write][level].get(page >> shift)
            if hpa is not None:
                pfn = (hpa >> PAGE_SHIFT) + (page & (1 << shift) - 1)
                return pfn, self._tags[level, page >> shift]
        return None

    def invalidate(self, start: int, npages: int) -> None:
        """Drop what translates pages start..start+npages."""
        for caches in self._pages:
            for level, cache in caches.items():
                shift = INDEX_BITS * (level - 1)
                first, last = start >> shift, (start + npages - 1) >> shift
                if last - first >= len(cache):
                    for key in [key for key in cache if first <= key <= last]:
                        del cache[key]
                else:
                    for key in range(first, last + 1):
                        cache.pop(key, None)

    def entries(self) -> Iterator[tuple[int, int, Level, bool]]:
        """(first page, hpa, level, write) of everything cached: for checks."""
        for write, caches in enumerate(self._pages):
            for level, cache in caches.items():
                for key, hpa in cache.items():
                    yield key << INDEX_BITS * (level - 1), hpa, level, bool(write)


def _by_level() -> dict[Level, dict[int, int]]:
    return {LEVEL_4K: {}, LEVEL_2M: {}, LEVEL_1G: {}}
