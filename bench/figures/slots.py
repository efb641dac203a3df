"""What one memslot among many costs: Linux has 32,764 of them, and looks none through.

Both sides are ours: what is held against a limit is the growth.
"""

from __future__ import annotations

from bench.contenders import Program
from bench.harness import AtMost, Bench, Figure, Row

FLAT = 1.25  # a longer list to move, and less of it in the caches


def changes(slots: int) -> Program:
    def args(bench: Bench) -> tuple[str, ...]:
        return str(slots), str(bench.samples // 20)

    return Program(f"a memslot goes and comes, of {slots:,}", module="bench.ours.slots", args=args)


FEW = changes(500)

SLOTS = Figure(
    "slots",
    "a memslot goes and comes back, among many",
    tuple(Row(changes(slots), FEW, AtMost(FLAT)) for slots in (6_000, 32_000)),
)
