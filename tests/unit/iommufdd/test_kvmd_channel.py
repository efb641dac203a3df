"""How iommufdd comes to kvmd: whoever is not let in is told what may stand in the way."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from iommufdd.core.hmm import UserFd
from iommufdd.hmm_client import HmmMirror
from iommufdd.kvm_client import KvmTdp
from iommufdd.kvmd_channel import KvmdChannel, nothing
from protocol.errors import UapiError
from protocol.flow import Wait, done
from protocol.kernel.linux import LINUX
from protocol.kernel.port import StreamSocket
from protocol.rpc.channel import NO_FDS, Body, Channel, Fds, Reply
from protocol.rpc.socket import Listener, connect_now
from protocol.units import PAGE_SIZE, Gfn, Hva
from tests.kit.by_hand import ByHand
from tests.unit.iommufdd.spaces import HVA, outcome
from tests.unit.protocol.wires import open_fds, wires


def test_who_is_hung_up_on_at_the_door_hears_that_there_may_be_no_room(tmp_path: Path) -> None:
    """A kvmd whose fd table is full turns away who connects, and lives."""
    ours, theirs = socket.socketpair()
    with wires() as wire, ours, theirs:
        listener = Listener(wire.loop, tmp_path / "kvmd", lambda sock: sock.close())
        channel = KvmdChannel(wire.loop, tmp_path / "kvmd", nothing)
        asked = wire.loop.flows.start(channel.present("TDP_FD_OPEN", ours.fileno(), "tdp"))
        wire.pump()
        with pytest.raises(UapiError, match="kvmd: it went away, or has no room") as refused:
            asked.result()
        assert refused.value.errno == errno.EOPNOTSUPP
        listener.close()


def test_a_kvmd_that_lets_nobody_in_does_not_hold_us(tmp_path: Path) -> None:
    """A stopped one, all its places taken: whoever asks is told, and all others are served."""
    ours, theirs = socket.socketpair()
    with wires() as wire, ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stopped:
        stopped.bind(str(tmp_path / "kvmd"))
        stopped.listen(0)
        first = connect_now(LINUX, tmp_path / "kvmd")
        channel = KvmdChannel(wire.loop, tmp_path / "kvmd", nothing)
        before = open_fds()
        asked = wire.loop.flows.start(channel.present("TDP_FD_OPEN", ours.fileno(), "tdp"))
        with pytest.raises(UapiError, match="no room for a connection to") as refused:
            asked.result()
        assert (refused.value.errno, open_fds()) == (errno.EAGAIN, before)
        first.close()


Ask = Callable[[HmmMirror | KvmTdp], Coroutine[Any, Any, object]]
PAGE = [HVA, 1 << 32, PAGE_SIZE, True]
NEXT = [HVA + PAGE_SIZE, 2 << 32, PAGE_SIZE, True]


class Answering:
    """kvmd's end of a channel, which says one thing."""

    closed = False

    def __init__(self, body: Body, fds: Fds) -> None:
        self.reply = Reply(body, fds)

    def call(self, op: str, body: Body | None = None, fds: Sequence[int] = ()) -> Wait[Reply]:
        return done(self.reply)


def answering(kind: type[HmmMirror | KvmTdp], body: Body, fds: Fds | None = None) -> Any:
    loop: Any = None
    made: Any = (
        KvmTdp(loop, Path(), 1, -1)
        if kind is KvmTdp
        else HmmMirror(loop, Path(), UserFd(-1), unwatched, nothing)
    )
    made._channel = Answering(body, fds or NO_FDS)
    return made


async def unwatched(start: Hva, size: int) -> None: ...


def pin(host: Any) -> Any:
    return host.pin(Hva(HVA), 2 * PAGE_SIZE, write=True, area=1)


def look(host: Any) -> Any:
    return host.range_fault(Hva(HVA), 2 * PAGE_SIZE, write=False, fault=False)


@pytest.mark.parametrize(
    ("kind", "ask", "body"),
    [
        (KvmTdp, lambda tdp: tdp.pin_all(), {}),
        (KvmTdp, lambda tdp: tdp.pin(Gfn(0), 1), {"pin": "1"}),
        (KvmTdp, lambda tdp: tdp.register(), {}),
        (KvmTdp, lambda tdp: tdp.register(), {"windows": []}),
        (KvmTdp, lambda tdp: tdp.register(), {"windows": [["tables", 0, 4096]]}),
        (HmmMirror, lambda host: host.register("mm"), {"windows": 7}),
        (HmmMirror, lambda host: host.pinned(Hva(HVA), PAGE_SIZE, area=1), {"pins": [], "end": HVA}),
        (HmmMirror, pin, {"pages": [], "end": HVA + PAGE_SIZE}),
        (HmmMirror, pin, {"pages": [PAGE], "end": HVA}),
        (HmmMirror, pin, {"pages": [PAGE], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, pin, {"pages": [NEXT], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, pin, {"pages": [PAGE, [*NEXT[:2], 1, True]], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, look, {"pages": [NEXT, PAGE], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, look, {"pages": [PAGE, PAGE], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, look, {"pages": [[0, 0, PAGE_SIZE, True]], "end": HVA + 2 * PAGE_SIZE}),
        (HmmMirror, look, {"pages": [[*PAGE, 1]], "end": HVA + 2 * PAGE_SIZE}),
    ],
)
def test_an_answer_that_is_none_is_eio(kind: type[HmmMirror | KvmTdp], ask: Ask, body: Body) -> None:
    """One of them left a device half attached, which nobody could take off again."""
    assert outcome(lambda: ByHand().run(ask(answering(kind, body)))) == errno.EIO


def test_answers_that_are_some_are_taken() -> None:
    body = {"pages": [PAGE, NEXT], "end": HVA + 2 * PAGE_SIZE}
    for ask in (pin, look):
        found = ByHand().run(ask(answering(HmmMirror, body)))
        assert [list(page) for page in found.pages] == [PAGE, NEXT]
    huge = {"pages": [[HVA - PAGE_SIZE, 1 << 32, 4 * PAGE_SIZE, True]], "end": HVA + 2 * PAGE_SIZE}
    assert ByHand().run(pin(answering(HmmMirror, huge))).pages[0].size == 4 * PAGE_SIZE
    gap = {"pages": [NEXT], "end": HVA + 2 * PAGE_SIZE}
    assert len(ByHand().run(look(answering(HmmMirror, gap))).pages) == 1


def test_windows_that_come_without_their_lease_are_closed() -> None:
    before = open_fds()
    fds = Fds(LINUX, [LINUX.reserve()])
    body = {"windows": [["tables", 0, PAGE_SIZE]]}
    assert outcome(lambda: ByHand().run(answering(KvmTdp, body, fds).register())) == errno.EIO
    assert open_fds() == before


@pytest.mark.parametrize("sent", ["nothing", "a file", "two sockets"])
def test_a_door_that_gives_no_channel_leaves_no_fd(tmp_path: Path, sent: str) -> None:
    ours, theirs = socket.socketpair()
    with wires() as wire, ours, theirs:

        def answer(channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
            fds.close()
            pair = [sock.detach() for sock in socket.socketpair()] if sent == "two sockets" else []
            channel.answer(request_id, {}, [LINUX.reserve()] if sent == "a file" else pair)

        def serve(sock: StreamSocket) -> None:
            Channel(wire.loop, sock, "door", on_request=answer)

        before = open_fds()
        listener = Listener(wire.loop, tmp_path / "kvmd", serve)
        channel = KvmdChannel(wire.loop, tmp_path / "kvmd", nothing)
        asked = wire.loop.flows.start(channel.present("TDP_FD_GET", ours.fileno(), "tdp"))
        wire.pump()
        numbers = {"nothing": errno.EBADF, "a file": errno.EIO, "two sockets": 0}
        assert outcome(asked.result) == numbers[sent]
        channel.hang_up()
        listener.close()
        wire.pump()
        assert open_fds() == before
