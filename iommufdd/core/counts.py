"""What iommufdd's own tables cost, counted as it happens; of all IOASes together, for they come and go.

The names are those of STATS.  `notes_pending` and `pinned_pages` are what there is now; the others only grow.
An IO page fault is spurious if its page was mapped already, retried if the host took the page away meanwhile,
major if it was read back from swap.  A huge leaf of which a part goes is split; one that takes the place of
smaller leaves is a collapse.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
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
