"""What our message participants share: forked servers with the daemons' own loop, and one way to report."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable

import trio

from bench.timing import percentiles, require_one_core
from protocol.daemon import configure_log
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop

Ask = Callable[[Loop, socket.socket], Awaitable[list[float]]]
Attach = Callable[[Loop, socket.socket, Callable[[Channel], None]], None]


def main(ask: Ask, server: Callable[[socket.socket], int]) -> None:
    """Fork `server` at the other end of a socket pair, run `ask` here, report its percentiles."""
    require_one_core()
    configure_log("warning")
    ours, theirs = socket.socketpair()
    child = fork(lambda: server(theirs), close=(ours,))
    theirs.close()
    p50, p99 = percentiles(trio.run(_ask, ask, ours))
    # A bug in a server must not pass for a figure.
    status = wait(child)
    if status != 0:
        sys.exit(f"a server ended with status {status}")
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


async def _ask(ask: Ask, sock: socket.socket) -> list[float]:
    async with trio.open_nursery() as nursery:
        loop = Loop(LINUX, Flows(on_crash))
        nursery.start_soon(loop.serve)
        took = await ask(loop, sock)
        nursery.cancel_scope.cancel()
    loop.close()
    return took


async def serve(sock: socket.socket, attach: Attach) -> None:
    """`attach(loop, sock, on_close)` opens the server's channel; it is served until the asker hangs up."""
    async with trio.open_nursery() as nursery:
        loop = Loop(LINUX, Flows(on_crash))

        def left(_: Channel) -> None:
            nursery.cancel_scope.cancel()
            loop.kick()

        attach(loop, sock, left)
        nursery.start_soon(loop.serve)
    loop.close()


def on_crash(error: BaseException) -> None:
    raise error


def fork(run: Callable[[], int], close: Iterable[socket.socket]) -> int:
    """A process that runs `run` without the sockets in `close`; its pid.  Not to be called under trio."""
    pid = os.fork()
    if pid != 0:
        return pid
    status = 1
    try:
        for sock in close:
            sock.close()
        status = run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Its exit status; once reaped, its CPU time counts as ours."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
