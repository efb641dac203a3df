"""Rivals that more than one figure is held against."""

from __future__ import annotations

from bench.contenders import CRival, Program

C_PINGPONG = CRival("C ping-pong", "pingpong.c")
C_CHAIN = CRival("C chain", "chain.c")

# A call takes some thirty times the C round trip: a tenth of the samples keeps the round short.
GRPC = Program(
    "gRPC",
    module="bench.rivals.grpc_peer",
    args=lambda bench: (str(bench.scratch / "grpc.sock"), str(bench.samples // 10)),
    needs=("grpc",),
)
