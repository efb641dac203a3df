"""How long a run may be, and how one ends that comes to no end of its own.

A run is over when whoever is waited for is.  If nobody can go on, or all who can do nothing but their rounds,
that never happens, and Stuck says who stands where.
"""

from __future__ import annotations

LIMIT_NS = 3600 * 10**9  # of virtual time: whoever is not done by then never will be
LIMIT_STEPS = 20_000  # with nothing to choose between: whoever takes so many goes round in circles
LIMIT_CHOICES = 5_000_000  # of one schedule, and so do all who take so many


class Stuck(Exception):
    """Nothing can happen any more, or nothing but watchdogs' rounds."""


class Stopped(Exception):
    """The strategy wants no more of this run."""
