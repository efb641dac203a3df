"""What an idle guest costs: a size of 1 TiB is only a number until something touches it.

What is counted exactly must be the same.  The daemons' private memory differs by a few pages from run to
run, whatever the guest: it may by PRIVATE_TOLERANCE.
"""

from __future__ import annotations

from bench.contenders import Program
from bench.harness import AtMost, Figure, Row, Unit

PRIVATE_TOLERANCE = 0.01


def idle(name: str, what: str, gib: int) -> Program:
    return Program(
        name,
        module="bench.ours.footprint",
        args=lambda bench: (what, str(gib)),
        unit=Unit.BYTES,
        pinned=False,
    )


EXACT_1T, EXACT_1G = idle("idle guest, 1 TiB", "exact", 1024), idle("idle guest, 1 GiB", "exact", 1)
PRIVATE_1T = idle("daemons' private, 1 TiB", "private", 1024)
PRIVATE_1G = idle("daemons' private, 1 GiB", "private", 1)

MEMORY = Figure(
    "memory",
    "memory of all processes, machine up and idle",
    (
        Row(EXACT_1T, EXACT_1G, AtMost(1)),
        Row(PRIVATE_1T, PRIVATE_1G, AtMost(1 + PRIVATE_TOLERANCE)),
    ),
)
