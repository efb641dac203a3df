"""Rival: gRPC over a Unix socket, synchronous, one unary call of 64 bytes and back.

The handlers are generic and the bodies plain bytes, so no protobuf is made or parsed and gRPC is
seen at its cheapest.  Run as a program it is the client: it starts the server as its child, on the
one core that both inherit, and prints the percentiles as the C rivals do.

    python -m bench.rivals.grpc_peer SOCKET COUNT
    python -m bench.rivals.grpc_peer SOCKET serve
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.timing import percentiles, require_one_core, time_each

SERVICE = "bench.Echo"
METHOD = "Echo"
MESSAGE = b"m" * 64
READY = "ready"
CALL_S_MAX = 10.0


def main(socket: str, what: str) -> None:
    require_one_core()
    if what == "serve":
        serve(socket)
    else:
        ask(socket, int(what))


def serve(socket: str) -> None:
    """Answer until the client closes our standard input."""
    echo = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
    # One worker: one request is in flight, and a second thread would only add hand-overs.
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: echo}),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    sys.stdout.write(READY + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop(grace=None).wait()


def ask(socket: str, count: int) -> None:
    argv = [sys.executable, "-m", "bench.rivals.grpc_peer", socket, "serve"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None, "asked for"
        assert server.stdout is not None, "asked for"
        if server.stdout.readline().strip() != READY:
            sys.exit("the gRPC server did not start")
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/{METHOD}")
            took = time_each(lambda: call(MESSAGE, timeout=CALL_S_MAX), count)
        server.stdin.close()
    p50, p99 = percentiles(took)
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
