"""Peers that break the protocol end their own connection, and no fd of theirs stays (I12, I14)."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from collections.abc import Iterator

import pytest

from protocol.rpc import channel as channel_module
from protocol.rpc.channel import Body, Channel, Fds, PeerGone
from protocol.rpc.session import MAX_BODY_BYTES, MAX_FDS, MAX_IN_FLIGHT
from tests.unit.protocol.wires import (
    ERROR,
    NOTIFY,
    REPLY,
    REQUEST,
    Wires,
    echo,
    failed,
    frame,
    open_fds,
    wires,
)


@pytest.fixture
def wire() -> Iterator[Wires]:
    with wires() as made:
        yield made


def silent(channel: Channel, number: int, body: Body, fds: Fds) -> None:
    fds.close()


ECHO = {"on_request": echo}

BAD = {
    "length past the limit": struct.pack("<IHH", MAX_BODY_BYTES + 1, 0, 0),
    "fds past the limit": struct.pack("<IHH", 4, MAX_FDS + 1, 0),
    "no such kind": struct.pack("<IHH", 4, 0, 4),
    "empty body": struct.pack("<IHH", 0, 0, 0),
    "not msgpack": struct.pack("<IHH", 1, 0, 0) + b"\xc1",
    "truncated msgpack": struct.pack("<IHH", 2, 0, 0) + b"\x92\x01",
    "more than one value": struct.pack("<IHH", 4, 0, 0) + b"\x92\x01\x80\x80",
    "not a pair": struct.pack("<IHH", 1, 0, 0) + b"\x07",
    "a triple": struct.pack("<IHH", 4, 0, 0) + b"\x93\x01\x80\x80",
    "invalid utf-8": struct.pack("<IHH", 5, 0, 0) + b"\x92\x01\x81\xa1\xff",
    "deeply nested": struct.pack("<IHH", 5002, 0, 0) + b"\x92\x01" + b"\x91" * 5000,
    "array that claims to be huge": struct.pack("<IHH", 5, 0, 0) + b"\xdd\xff\xff\xff\xff",
    "id is text": frame(REQUEST, "1", {}),
    "id is true": frame(REQUEST, True, {}),
    "body is a list": frame(REQUEST, 1, []),
    "integer keys": frame(REQUEST, 1, {1: 2}),
    "id in use": frame(REQUEST, 1, {}) * 2,
    "reply to nothing": frame(REPLY, 99, {}),
    "error to nothing": frame(ERROR, 99, {"errno": 1, "why": ""}),
    "announced fds do not come": frame(REQUEST, 1, {}, 1),
    "notification nobody takes": frame(NOTIFY, 0, {}),
}


@pytest.mark.parametrize("why", BAD)
@pytest.mark.parametrize("fds", [0, 2], ids=["plain", "with fds"])
def test_a_malformed_frame_ends_its_own_connection_only(wire: Wires, why: str, fds: int) -> None:
    """With fds: the bad bytes bring two along, and they must not stay."""
    bad, raw = wire.raw(on_request=silent)
    good, other = wire.pair(other=ECHO)
    data = BAD[why]
    sent = [os.memfd_create("x") for _ in range(fds)]
    if fds and len(data) >= 8 and why != "fds past the limit":
        data = data[:4] + struct.pack("<H", fds + (why == "announced fds do not come")) + data[6:]
    raw.send(data, sent)
    for fd in sent:
        os.close(fd)
    before = len(open_fds())
    wire.pump()
    assert bad.closed
    assert raw.hung_up
    assert len(open_fds()) <= before
    wait = good.call("OP")
    wire.pump()
    assert wait.done
    assert not other.closed
    assert wire.crashes == []


@pytest.mark.parametrize("number", [0, -1, 4096, "EINVAL", None, True, 1.5])
def test_an_error_reply_without_an_errno_ends_the_connection(wire: Wires, number: object) -> None:
    left, raw = wire.raw()
    left.call("OP")
    wire.pump()
    raw.send(frame(ERROR, 1, {"errno": number, "why": "x"}))
    wire.pump()
    assert left.closed


@pytest.mark.parametrize("kind", [ERROR, REPLY, NOTIFY, REQUEST])
def test_fds_on_a_frame_that_should_have_none_do_not_stay(wire: Wires, kind: int) -> None:
    left, raw = wire.raw(on_notify=lambda c, body, fds: None, on_request=echo)
    for i in range(1, 11):
        wait = left.call("OP")
        wire.pump()
        fd = os.memfd_create("x")
        raw.send(frame(kind, i, {"errno": 5, "why": ""}, 1), [fd])
        os.close(fd)
        before = len(open_fds())
        wire.pump()
        if kind == REPLY:
            wait.result().fds.close()
        assert len(open_fds()) <= before
    assert not left.closed


def test_fds_no_frame_announced_end_the_connection(wire: Wires) -> None:
    left, raw = wire.raw(on_request=echo)
    fd = os.memfd_create("x")
    raw.send(frame(REQUEST, 1, {}), [fd])
    os.close(fd)
    wire.pump()
    assert left.closed


def test_fds_cannot_be_piled_up_behind_frames_that_never_end(wire: Wires) -> None:
    left, raw = wire.raw(on_request=echo)
    one = frame(REQUEST, 1, {"pad": b"x" * 100})
    before = len(open_fds())
    raw.send(one[:50])
    for i in itertools.count(2):
        fds = [os.memfd_create("x") for _ in range(MAX_FDS)]
        raw.send(one[50:] + frame(REQUEST, i, {"pad": b"x" * 100})[:50], fds)
        one = frame(REQUEST, i, {"pad": b"x" * 100})
        for fd in fds:
            os.close(fd)
        wire.pump()
        if left.closed:
            break
        assert len(open_fds()) <= before + MAX_FDS
        assert i < 10
    assert len(open_fds()) <= before


def test_more_fds_in_one_message_than_any_may_carry_are_refused(wire: Wires) -> None:
    left, raw = wire.raw(on_request=echo)
    fds = [os.memfd_create("x") for _ in range(MAX_FDS + 1)]
    raw.send(frame(REQUEST, 1, {}, MAX_FDS), fds)
    for fd in fds:
        os.close(fd)
    before = len(open_fds())
    wire.pump()
    assert len(open_fds()) == before
    assert [(kind, body.get("errno")) for kind, _, _, body in raw.frames()] == [(ERROR, errno.EMFILE)]
    assert not left.closed


def test_the_unanswered_request_past_the_limit_ends_the_connection(wire: Wires) -> None:
    left, raw = wire.raw(on_request=silent)
    for start in range(0, MAX_IN_FLIGHT, 512):
        raw.send(b"".join(frame(REQUEST, i, {}) for i in range(start, start + 512)))
        wire.pump()
    assert not left.closed
    raw.send(frame(REQUEST, MAX_IN_FLIGHT, {}))
    wire.pump()
    assert left.closed


def test_a_peer_that_does_not_read_is_cut_off(wire: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 1 << 20)
    ends: list[str] = []
    left, _ = wire.raw(on_close=lambda c: ends.append(c.name))
    waits = []
    for _ in range(64):
        if left.closed:
            break
        waits.append(left.call("OP", {"data": b"x" * (1 << 16)}))
        wire.pump()
    assert left.closed
    assert ends == ["left"]
    assert all(isinstance(failed(wait), PeerGone) for wait in waits)


def test_a_slow_peer_within_the_limit_gets_everything(wire: Wires) -> None:
    left, raw = wire.raw()
    for i in range(40):
        left.notify("OP", {"n": i, "data": b"x" * (1 << 16)})
    numbers: list[int] = []
    data = b""
    for _ in range(10_000):
        wire.loop.settle()
        wire.loop.turn(0)
        try:
            data += raw.sock.recv(5000)
        except BlockingIOError:
            break
    at = 0
    while at < len(data):
        size = struct.unpack_from("<I", data, at)[0]
        numbers.append(channel_module._UNPACK(data[at + 8 : at + 8 + size])[1]["n"])
        at += 8 + size
    assert numbers == list(range(40))


def test_a_peer_that_answers_nothing_is_cut_off(wire: Wires) -> None:
    left, _ = wire.raw()
    waits = [left.call("OP") for _ in range(MAX_IN_FLIGHT)]
    assert not left.closed
    waits.append(left.call("OP"))
    assert left.closed
    assert all(isinstance(failed(wait), PeerGone) for wait in waits)
