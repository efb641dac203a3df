"""The rivals among themselves: what the machine gives today, and a run that needs nothing of ours."""

from __future__ import annotations

from bench.figures.shared import C_CHAIN, C_PINGPONG, GRPC
from bench.harness import Figure, Row, Shown

LIMITS = Figure(
    "limits",
    "the rivals against the C round trip",
    (
        Row(C_CHAIN, C_PINGPONG, Shown()),
        Row(GRPC, C_PINGPONG, Shown()),
    ),
)
