"""What befalls a process at a step of its."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fate:
    """What befalls a process instead of its `step`-th step, from 1 on: it is stopped for that long, as by
    SIGSTOP and SIGCONT, or (None) it dies, as by SIGKILL.
    """

    step: int
    stops_s: float | None = None
