"""A page given up, until the last cache has acknowledged: VMM, kvmd, iommufdd, device and back.

Held against the C chain, three processes that carry a message there and back.
"""

from __future__ import annotations

from bench.contenders import Program
from bench.figures.shared import C_CHAIN
from bench.harness import AtMost, Figure, Row

# Each page must be faulted in first.
OURS = Program(
    "invalidation", module="bench.ours.invalidation", args=lambda bench: (str(bench.samples // 20),)
)

INVALIDATION = Figure("invalidation", "MADV_DONTNEED to the last ack", (Row(OURS, C_CHAIN, AtMost(12)),))
