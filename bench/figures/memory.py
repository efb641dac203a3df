"""What an idle guest costs: a size of 1 TiB is only a number until something touches it.

Count what the kernel counts: blocks of the memfds and private pages of the daemons.
"""

from __future__ import annotations

from bench.contenders import Unwritten
from bench.harness import AtMost, Figure, Row, Unit

IDLE_1T = Unwritten("idle guest, 1 TiB", waits_for="the four daemons", unit=Unit.BYTES)
IDLE_1G = Unwritten("idle guest, 1 GiB", waits_for="the four daemons", unit=Unit.BYTES)

MEMORY = Figure("memory", "memory of all processes, machine up and idle", (Row(IDLE_1T, IDLE_1G, AtMost(1)),))
