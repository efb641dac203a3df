"""The device TLB: translations a function holds, so that its DMA goes out translated.

Models an address translation cache [PCIe 10.1]: filled by successful translation completions, dropped by
invalidation requests, never by a page response.  Reads and writes are cached apart, so that a hit is one
look-up: an entry with both rights stands in both.

What is kept of a page is the distance from iova to hpa.  Pages that are neighbours in the host have the same,
so a range whose pages all have it is one piece of host memory, found by one slice and one count.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocol.pt import bits
from protocol.pt.geometry import ENTRIES, INDEX_BITS
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, PAGE_SHIFT, Hpa, Iova, IovaPfn, Level, Pfn

MAX_BLOCKS = 64  # of 512 neighbouring 4 KiB pages, for each right; the oldest goes first
MAX_HUGE = 4096  # leaves of one size, for each right; likewise
HUGE_LEVELS = (LEVEL_2M, LEVEL_1G)
_BLOCK_SHIFT = PAGE_SHIFT + INDEX_BITS
_BLOCK_MASK = (1 << _BLOCK_SHIFT) - 1

HpaRun = tuple[Hpa, int]  # (first byte, bytes)
_Block = list[int | None]


class DevTlb:
    def __init__(self) -> None:
        self.hits = 0  # pages of DMA that went out translated
        self.misses = 0  # translation requests
        # [write]: distances of the 4 KiB pages of each block, and of each huge leaf by level
        self._blocks: tuple[dict[int, _Block], ...] = ({}, {})
        self._huge: tuple[dict[Level, dict[int, int]], ...] = tuple(
            {level: {} for level in HUGE_LEVELS} for _ in (False, True)
        )
        self._tags: dict[tuple[Level, int], int] = {}

    def fill(self, page: IovaPfn, hpa: Hpa, level: Level, rights: int, tag: int | None) -> None:
        """Cache what a completion granted: the whole leaf of `level` that covers 4 KiB page `page`."""
        shift = INDEX_BITS * (level - 1)
        key = page >> shift
        distance = hpa - (key << PAGE_SHIFT + shift)
        for write, need in ((False, bits.READ), (True, bits.WRITE)):
            if not rights & need:
                continue
            if level == LEVEL_4K:
                self._block(write, page)[page & ENTRIES - 1] = distance
            else:
                leaves = self._huge[write][level]
                if len(leaves) >= MAX_HUGE:
                    del leaves[next(iter(leaves))]
                leaves[key] = distance
        if tag is not None:
            self._tags[level, key] = tag

    def _block(self, write: bool, page: IovaPfn) -> _Block:
        blocks = self._blocks[write]
        block = blocks.get(page >> INDEX_BITS)
        if block is None:
            if len(blocks) >= MAX_BLOCKS:
                del blocks[next(iter(blocks))]
            block = blocks[page >> INDEX_BITS] = [None] * ENTRIES
        return block

    def runs(self, iova: Iova, size: int, write: bool) -> tuple[list[HpaRun], int]:
        """Where the first bytes of iova..iova+size lie, as far as all pages are cached; how many bytes."""
        found: list[HpaRun] = []
        blocks = self._blocks[write]
        at: int = iova
        end = at + size
        while at < end:
            stop = (at | _BLOCK_MASK) + 1
            if stop > end:
                stop = end
            block = blocks.get(at >> _BLOCK_SHIFT)
            distance = None if block is None else block[at >> PAGE_SHIFT & ENTRIES - 1]
            if block is not None and distance is not None:
                pages = block[at >> PAGE_SHIFT & ENTRIES - 1 : (stop - 1 >> PAGE_SHIFT & ENTRIES - 1) + 1]
                if pages.count(distance) < len(pages):
                    at = _mixed_runs(found, pages, at, stop)
                    continue
            else:
                leaf = self._huge_leaf(write, IovaPfn(at >> PAGE_SHIFT))
                if leaf is None:
                    return found, at - iova
                distance, level = leaf
                stop = min(end, (at | (1 << PAGE_SHIFT + INDEX_BITS * (level - 1)) - 1) + 1)
            _append(found, at, distance, stop - at)
            at = stop
        return found, size

    def _huge_leaf(self, write: bool, page: IovaPfn) -> tuple[int, Level] | None:
        for level, leaves in self._huge[write].items():
            distance = leaves.get(page >> INDEX_BITS * (level - 1))
            if distance is not None:
                return distance, level
        return None

    def tag_of(self, page: IovaPfn, write: bool) -> tuple[Pfn, int] | None:
        """(debug) the frame that 4 KiB page `page` is cached as, and its tag when it was walked."""
        block = self._blocks[write].get(page >> INDEX_BITS)
        distance = None if block is None else block[page & ENTRIES - 1]
        level = LEVEL_4K
        if distance is None:
            leaf = self._huge_leaf(write, page)
            if leaf is None:
                return None
            distance, level = leaf
        tag = self._tags.get((level, page >> INDEX_BITS * (level - 1)))
        return None if tag is None else (Pfn(page + (distance >> PAGE_SHIFT)), tag)

    def invalidate(self, start: IovaPfn, npages: int) -> None:
        """Drop what translates pages start..start+npages."""
        last = start + npages - 1
        for blocks in self._blocks:
            for key in _touched(blocks, start >> INDEX_BITS, last >> INDEX_BITS):
                first, end = max(start - (key << INDEX_BITS), 0), last - (key << INDEX_BITS) + 1
                if first == 0 and end >= ENTRIES:
                    del blocks[key]
                else:
                    gone = range(first, min(end, ENTRIES))
                    blocks[key][gone.start : gone.stop] = [None] * len(gone)
        for sizes in self._huge:
            for level, leaves in sizes.items():
                shift = INDEX_BITS * (level - 1)
                for key in _touched(leaves, start >> shift, last >> shift):
                    del leaves[key]
        if last - start >= len(self._tags):
            self._tags = {
                (level, key): tag
                for (level, key), tag in self._tags.items()
                if not start >> INDEX_BITS * (level - 1) <= key <= last >> INDEX_BITS * (level - 1)
            }

    def entries(self) -> Iterator[tuple[IovaPfn, Hpa, Level, bool]]:
        """(first page, hpa, level, write) of everything cached: for checks."""
        for write in (False, True):
            for key, block in self._blocks[write].items():
                for page, distance in enumerate(block, key << INDEX_BITS):
                    if distance is not None:
                        yield IovaPfn(page), Hpa((page << PAGE_SHIFT) + distance), LEVEL_4K, write
            for level, leaves in self._huge[write].items():
                for key, distance in leaves.items():
                    page = key << INDEX_BITS * (level - 1)
                    yield IovaPfn(page), Hpa((page << PAGE_SHIFT) + distance), level, write


def _mixed_runs(found: list[HpaRun], distances: _Block, at: int, stop: int) -> int:
    """Append a run for each page from `at` on, up to `stop` or the first page without a distance."""
    for page, distance in enumerate(distances, at >> PAGE_SHIFT):
        if distance is None:
            break
        end = min(page + 1 << PAGE_SHIFT, stop)
        _append(found, at, distance, end - at)
        at = end
    return at


def _append(found: list[HpaRun], at: int, distance: int, size: int) -> None:
    """One more run, or the last one longer."""
    hpa = at + distance
    if found and found[-1][0] + found[-1][1] == hpa:
        hpa, before = found.pop()
        size += before
    found.append((hpa, size))  # type: ignore[arg-type]  # Hpa() is a call, and this is each page of each DMA


def _touched(cache: dict[int, _Block] | dict[int, int], first: int, last: int) -> list[int]:
    """The keys of `cache` in first..last."""
    if last - first >= len(cache):
        return [key for key in cache if first <= key <= last]
    return [key for key in range(first, last + 1) if key in cache]
