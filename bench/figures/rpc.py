"""One validated request and its reply between two of our processes, on one core."""

from __future__ import annotations

from bench.contenders import Program
from bench.figures.shared import C_PINGPONG, GRPC
from bench.harness import AtLeast, AtMost, Figure, Row

OURS = Program("rpc", module="bench.ours.round_trip", args=lambda bench: (str(bench.samples),))

RPC = Figure(
    "rpc",
    "validated request, round trip",
    (
        Row(OURS, C_PINGPONG, AtMost(4.5)),
        Row(OURS, GRPC, AtLeast(6)),
    ),
)
