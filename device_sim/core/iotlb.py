"""The remapping unit's caches of the second stage: the IOTLB and the paging-structure cache.

Models [VT-d 6.2]: entries are tagged by domain id and not by PASID or device, so what one device filled
serves all of a domain, and every kind of invalidation the driver may send finds what it must.  An
invalidation with the hint IH keeps paging-structure entries: the driver says that only leaves changed
[VT-d 6.5.2].
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.pt.geometry import INDEX_BITS
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, Hpa, IovaPfn, Level

MAX_ENTRIES = 4096  # of one domain and page size; the oldest goes first
LEAF_LEVELS = (LEVEL_4K, LEVEL_2M, LEVEL_1G)


class IotlbEntry(NamedTuple):
    """A leaf: where its first byte lies, its size, its rights, and (debug) its frame's tag when it was
    walked.
    """

    hpa: Hpa
    level: Level
    rights: int
    tag: int


class PscEntry(NamedTuple):
    """A pointer to a level-1 table and the rights of the path to it."""

    table: Hpa
    rights: int


class _Domain:
    __slots__ = ("leaves", "tables")

    def __init__(self) -> None:
        self.leaves: dict[Level, dict[int, IotlbEntry]] = {level: {} for level in LEAF_LEVELS}
        self.tables: dict[int, PscEntry] = {}


class Iotlb:
    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.psc_hits = 0
        self._domains: dict[int, _Domain] = {}

    def lookup(self, did: int, page: IovaPfn, need: int) -> IotlbEntry | None:
        """The entry that gives iova page `page` the right `need`; counts a hit or a miss."""
        domain = self._domains.get(did)
        if domain is not None:
            for level in LEAF_LEVELS:
                entry = domain.leaves[level].get(page >> INDEX_BITS * (level - 1))
                if entry is not None and entry.rights & need:
                    self.hits += 1
                    return entry
        self.misses += 1
        return None

    def fill(self, did: int, page: IovaPfn, entry: IotlbEntry) -> None:
        leaves = self._domain(did).leaves[entry.level]
        _make_room(leaves)
        leaves[page >> INDEX_BITS * (entry.level - 1)] = entry

    def lookup_table(self, did: int, page: IovaPfn, need: int) -> PscEntry | None:
        """The level-1 table that translates `page`, if its pointer is cached with the right `need`."""
        domain = self._domains.get(did)
        entry = None if domain is None else domain.tables.get(page >> INDEX_BITS)
        if entry is None or not entry.rights & need:
            return None
        self.psc_hits += 1
        return entry

    def fill_table(self, did: int, page: IovaPfn, entry: PscEntry) -> None:
        tables = self._domain(did).tables
        _make_room(tables)
        tables[page >> INDEX_BITS] = entry

    def invalidate_all(self) -> None:
        self._domains.clear()

    def invalidate_domain(self, did: int) -> None:
        self._domains.pop(did, None)

    def invalidate_pages(self, did: int, start: IovaPfn, npages: int, *, leaves_only: bool) -> None:
        """Drop what translates pages start..start+npages; table pointers too unless `leaves_only` (IH)."""
        domain = self._domains.get(did)
        if domain is None:
            return
        for level in LEAF_LEVELS:
            _drop(domain.leaves[level], start, npages, INDEX_BITS * (level - 1))
        if not leaves_only:
            _drop(domain.tables, start, npages, INDEX_BITS)

    def entries(self, did: int) -> list[tuple[IovaPfn, IotlbEntry]]:
        """(first page, entry) of everything cached for a domain: for checks."""
        domain = self._domains.get(did)
        if domain is None:
            return []
        return [
            (IovaPfn(key << INDEX_BITS * (level - 1)), entry)
            for level in LEAF_LEVELS
            for key, entry in domain.leaves[level].items()
        ]

    def _domain(self, did: int) -> _Domain:
        domain = self._domains.get(did)
        if domain is None:
            domain = self._domains[did] = _Domain()
        return domain


def _make_room(cache: dict[int, IotlbEntry] | dict[int, PscEntry]) -> None:
    if len(cache) >= MAX_ENTRIES:
        del cache[next(iter(cache))]


def _drop(
    cache: dict[int, IotlbEntry] | dict[int, PscEntry], start: IovaPfn, npages: int, shift: int
) -> None:
    """Remove every key whose pages overlap start..start+npages."""
    first, last = start >> shift, (start + npages - 1) >> shift
    if last - first >= len(cache):
        for key in [key for key in cache if first <= key <= last]:
            del cache[key]
    else:
        for key in range(first, last + 1):
            cache.pop(key, None)
