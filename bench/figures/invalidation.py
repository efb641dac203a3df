"""A page given up, until the last cache has acknowledged: VMM, kvmd, iommufdd, device and back.

Shown beside the C chain, three processes that carry a message there and back: what it should cost is not
said yet.
"""

from __future__ import annotations

from bench.contenders import Program
from bench.figures.shared import C_CHAIN
from bench.harness import Figure, Row, Shown

# Each page must be faulted in first.
OURS = Program(
    "invalidation", module="bench.ours.invalidation", args=lambda bench: (str(bench.samples // 20),)
)

INVALIDATION = Figure("invalidation", "MADV_DONTNEED to the last ack", (Row(OURS, C_CHAIN, Shown()),))
