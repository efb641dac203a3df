"""Ours: processes in a line that pass one validated request on and its reply back, as the rivals do.

Two processes are one round trip, three the fault chain A -> B -> C -> B -> A.  Each runs the daemons'
own message loop, channel and service over a Unix stream; what is asked has the shape of a fault: a map
of seven keys, checked on arrival in every process, answered by four.  B answers from a flow that
awaits C, as iommufdd does.

    python -m bench.ours.line PROCESSES COUNT
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterable
from time import perf_counter_ns

import trio

from bench.timing import percentiles, require_one_core
from protocol.daemon import configure_log
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.service import Message, Method, Service


class Fault(Message):
    fault_id: int
    pasid: int
    grpid: int
    gfn: int
    write: bool
    execute: bool


REQUEST: Body = {
    "fault_id": 7,
    "pasid": 1,
    "grpid": 3,
    "gfn": 0x1_2345,
    "write": True,
    "execute": False,
}
REPLY: Body = {"fault_id": 7, "code": "success", "level": 1, "seq": 42}


def main(processes: int, count: int) -> None:
    require_one_core()
    configure_log("warning")
    ours, theirs = socket.socketpair()
    child = fork(lambda: serve(theirs, processes - 2), close=(ours,))
    theirs.close()
    p50, p99 = percentiles(trio.run(ask_each, ours, count))
    # A bug in a server must not pass for a figure.
    status = wait(child)
    if status != 0:
        sys.exit(f"a server ended with status {status}")
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


async def ask_each(sock: socket.socket, count: int) -> list[float]:
    """Nanoseconds of each of `count` requests; a tenth more goes first, untimed."""
    took: list[float] = []
    async with trio.open_nursery() as nursery:
        loop = Loop(on_crash)
        nursery.start_soon(loop.serve)
        channel = Channel(loop, sock, "next")
        for _ in range(count // 10):
            await channel.ask("fault", REQUEST)
        for _ in range(count):
            start = perf_counter_ns()
            await channel.ask("fault", REQUEST)
            took.append(perf_counter_ns() - start)
        channel.close()
        nursery.cancel_scope.cancel()
    loop.close()
    return took


def serve(up: socket.socket, behind: int) -> int:
    """Answer on `up` until the asker hangs up; the exit status of the processes behind us."""
    if behind == 0:
        trio.run(answer_all, up)
        return 0
    ours, theirs = socket.socketpair()
    child = fork(lambda: serve(theirs, behind - 1), close=(up, ours))
    theirs.close()
    trio.run(forward_all, up, ours)
    return wait(child)


async def answer_all(up: socket.socket) -> None:
    def answer(_: None, _fault: Fault, _fds: Fds) -> Body:
        return REPLY

    async with trio.open_nursery() as nursery:
        loop = Loop(on_crash)
        service: Service[None] = Service("last", {"fault": Method(Fault, answer)})
        Channel(loop, up, "up", on_request=service.bind(None), on_close=leave(nursery, loop))
        nursery.start_soon(loop.serve)
    loop.close()


async def forward_all(up: socket.socket, down: socket.socket) -> None:
    async def forward(below: Channel, fault: Fault) -> Body:
        body = {
            "fault_id": fault.fault_id,
            "pasid": fault.pasid,
            "grpid": fault.grpid,
            "gfn": fault.gfn,
            "write": fault.write,
            "execute": fault.execute,
        }
        return (await below.call("fault", body)).body

    async with trio.open_nursery() as nursery:
        loop = Loop(on_crash)
        below = Channel(loop, down, "down")
        service: Service[Channel] = Service(
            "middle", {"fault": Method(Fault, lambda channel, fault, _fds: forward(channel, fault))}
        )
        Channel(loop, up, "up", on_request=service.bind(below), on_close=leave(nursery, loop))
        nursery.start_soon(loop.serve)
    # Only now: the hang-up is how the process behind us learns that it may go.
    below.close()
    loop.close()


def leave(nursery: trio.Nursery, loop: Loop) -> Callable[[Channel], None]:
    """What a server does when its asker hangs up."""

    def closed(_: Channel) -> None:
        nursery.cancel_scope.cancel()
        loop.kick()

    return closed


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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
