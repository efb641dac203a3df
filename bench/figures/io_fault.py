"""A whole IO page fault: walk, miss, page request, fault in KVM, response, retried DMA.

Held against the C chain, which carries the same messages and does none of the work between them.
The sample's parts say where the time goes.
"""

from __future__ import annotations

from bench.contenders import Program
from bench.figures.shared import C_CHAIN
from bench.harness import AtMost, Figure, Row

# A fault takes some ten times a message, and the device remembers the last 4096.
OURS = Program(
    "IO page fault", module="bench.ours.fault", args=lambda bench: (str(min(bench.samples // 10, 3000)),)
)

IO_FAULT = Figure("io_fault", "walk to retried DMA", (Row(OURS, C_CHAIN, AtMost(9)),))
