"""What happens in iommufdd, counted; of all IOASes and of all units together, for they come and go.

The names are those of STATS.  `notes_pending` and `pinned_pages` are what there is now; the others only grow.
An IO page fault is spurious if its page was mapped already, retried if the host took the page away meanwhile,
major if it was read back from swap.  A huge leaf of which a part goes is split; one that takes the place of
smaller leaves is a collapse.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """What iommufdd's own tables cost."""

    pinned_pages: int = 0
    notes: int = 0
    notes_mapped: int = 0
    notes_pending: int = 0
    notes_lost: int = 0
    io_faults_major: int = 0
    io_faults_spurious: int = 0
    io_fault_retries: int = 0
    splits: int = 0
    collapses: int = 0
    hmm_invalidations: int = 0


@dataclass(slots=True)
class UnitCounts:
    """What went to and fro between the driver and the units."""

    page_requests: int = 0
    malformed: int = 0
    responses: int = 0
    responses_lost: int = 0  # nobody was there any more
    partial_discarded: int = 0
    kicks: int = 0  # stores to the tail of a queue
    descriptors: Counter[str] = field(default_factory=Counter)  # by kind
