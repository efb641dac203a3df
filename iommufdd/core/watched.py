"""The memory that an IOAS on demand and the mirrors on it look at.

Whose it is, which areas show it, and which lookups of it are under way.  Nothing here knows who looks, so
that the IOAS, its mirrors and their pins can all stand on it.

Models what a driver keeps beside its mmu_interval_notifiers [mm hmm.c].
"""

from __future__ import annotations

from iommufdd.core.area import Areas
from iommufdd.core.counts import Counts
from iommufdd.core.hmm import Lookups, ProcessMemory
from iommufdd.core.source import Source


class WatchedMemory:
    """`source`: the process, None until something of it is mapped; it does not change after."""

    def __init__(self, areas: Areas, counts: Counts) -> None:
        self.areas = areas
        self.counts = counts
        self.lookups = Lookups()
        self.source: Source | None = None

    @property
    def host(self) -> ProcessMemory:
        assert self.source is not None, "an area has memory of some process"
        return self.source.host

    def new_number(self) -> int:
        """Whose pins they are, as the host is told."""
        assert self.source is not None, "what is pinned is in an area"
        return self.source.new_number()
