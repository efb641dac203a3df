"""The fault chain's messages only: three of our processes, each validating what it is told or asked."""

from __future__ import annotations

from bench.contenders import Program
from bench.figures.shared import C_CHAIN
from bench.harness import AtMost, Figure, Row

OURS = Program("rpc chain", module="bench.ours.chain", args=lambda bench: (str(bench.samples),))

CHAIN = Figure("chain", "A -> B -> C -> B -> A, messages only", (Row(OURS, C_CHAIN, AtMost(5)),))
