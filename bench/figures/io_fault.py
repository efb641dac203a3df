"""A whole IO page fault: walk, miss, page request, fault in KVM, response, retried DMA.

Held against the C chain, which carries the same messages and does none of the work between them.
The sample's parts say where the time goes: walk, messages, IOMMUFD, KVM's fault, retry.
"""

from __future__ import annotations

from bench.contenders import Unwritten
from bench.figures.shared import C_CHAIN
from bench.harness import AtMost, Figure, Row

OURS = Unwritten("IO page fault", waits_for="the four daemons")

IO_FAULT = Figure("io_fault", "walk to retried DMA", (Row(OURS, C_CHAIN, AtMost(9)),))
