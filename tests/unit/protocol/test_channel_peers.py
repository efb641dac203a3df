"""Peers that break the protocol end their own connection, and no fd of theirs stays (I12, I14)."""

from __future__ import annotations

import os
import struct
from typing import Any

import msgpack
import pytest

from protocol.rpc import channel as channel_module
from protocol.rpc.body import MAX_DEPTH, MAX_LIST_ITEMS, MAX_MAP_ITEMS, MAX_NESTED
from protocol.rpc.channel import Body, Channel, Fds, PeerGone
from protocol.rpc.loop import RECV_BYTES
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
)


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


@pytest.mark.parametrize("cut", [3, 8, 50], ids=["half a header", "a header", "half a body"])
def test_half_a_frame_holds_no_fds(wire: Wires, cut: int) -> None:
    """Its own channel's fd among them, say: nobody would ever hang up then."""
    left, raw = wire.raw(on_request=echo)
    before = len(open_fds())
    own = os.dup(raw.sock.fileno())
    raw.send(frame(REQUEST, 1, {"pad": b"x" * 100}, 1)[:cut], [own])
    os.close(own)
    wire.pump()
    assert left.closed
    assert len(open_fds()) <= before


def test_fds_come_with_the_last_bytes_of_a_frame_however_long(wire: Wires) -> None:
    """Longer than what one receive takes, and cut by it anywhere: behind frames of every length."""
    got: list[tuple[int, int]] = []

    def keep(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        got.append((len(body["pad"]), len(fds)))
        echo(channel, number, body, fds)

    left, _ = wire.pair({}, {"on_request": keep})
    lengths = [*range(1, 5000, 613), *range(RECV_BYTES - 5000, RECV_BYTES + 5000, 501), 1 << 20]
    for length in lengths:
        left.call("OP", {"pad": bytes(length)}, [os.memfd_create("x")])
        left.call("OP", {"pad": bytes(RECV_BYTES - length % 4096)})
    wire.pump()
    assert [(length, n) for length, n in got if n] == [(length, 1) for length in lengths]
    assert len(got) == 2 * len(lengths)


def test_more_fds_in_one_message_than_any_may_carry_are_refused(wire: Wires) -> None:
    left, raw = wire.raw(on_request=echo)
    fds = [os.memfd_create("x") for _ in range(MAX_FDS + 1)]
    raw.send(frame(REQUEST, 1, {}, MAX_FDS), fds)
    for fd in fds:
        os.close(fd)
    before = len(open_fds())
    wire.pump()
    assert len(open_fds()) <= before
    assert left.closed


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
        numbers.append(msgpack.unpackb(data[at + 8 : at + 8 + size])[1]["n"])
        at += 8 + size
    assert numbers == list(range(40))


def test_a_peer_that_answers_nothing_is_cut_off(wire: Wires) -> None:
    left, _ = wire.raw()
    waits = [left.call("OP") for _ in range(MAX_IN_FLIGHT)]
    assert not left.closed
    waits.append(left.call("OP"))
    assert left.closed
    assert all(isinstance(failed(wait), PeerGone) for wait in waits)


# -- bodies that cost more than they look ------------------------------------------------------------------


def nested(depth: int) -> Any:
    """So many lists and maps, one in the other, by turns."""
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (nested(MAX_DEPTH - 1), True),
        (nested(MAX_DEPTH + 1), False),
        *((nested(depth), False) for depth in (500, 990, 1000, 1020)),
        ([0] * MAX_LIST_ITEMS, True),
        ([0] * (MAX_LIST_ITEMS + 1), False),
        ({str(n): n for n in range(MAX_MAP_ITEMS)}, True),
        ({str(n): n for n in range(MAX_MAP_ITEMS + 1)}, False),
        ([[[0] * 1000] * 1000], True),
        ([[]] * MAX_LIST_ITEMS, True),
        ([[[]] * 60] * (MAX_NESTED // 61 - 1), True),
        ([[[]] * 60] * (MAX_NESTED // 61 + 1), False),
        ([{"a": {}}] * (MAX_NESTED // 2 + 1), False),
        (msgpack.ExtType(5, b"x"), False),
    ],
    ids=lambda value: f"{type(value).__name__}" if not isinstance(value, bool) else str(value),
)
def test_what_is_nested_or_counted_has_limits(wire: Wires, value: Any, allowed: bool) -> None:
    left, raw = wire.raw(on_request=echo)
    data = frame(REQUEST, 1, {"op": "OP", "value": value})
    for start in range(0, len(data), 1 << 16):
        if not left.closed:
            raw.send(data[start : start + (1 << 16)])
        wire.pump()
    assert left.closed is not allowed
    assert wire.crashes == []


@pytest.mark.parametrize("depth", [3, MAX_DEPTH, 990, 1000])
def test_an_error_that_cannot_be_shown_fails_its_request(wire: Wires, depth: int) -> None:
    left, raw = wire.raw()
    waits = [left.call("OP") for _ in range(2)]
    raw.send(frame(ERROR, 1, {"errno": 5, "why": nested(depth)}))
    wire.pump()
    failed(waits[0])
    assert waits[1].done is left.closed
    assert wire.crashes == []


def test_an_answer_we_have_a_bug_with_fails_its_request(wire: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    left, raw = wire.raw()
    waits = [left.call("OP") for _ in range(2)]
    monkeypatch.setattr(channel_module, "UapiError", None)
    for number in (1, 2):
        raw.send(frame(ERROR, number, {"errno": 5, "why": "x"}))
        wire.pump()
    assert [type(failed(wait)) for wait in waits] == [PeerGone, PeerGone]
    assert len(wire.crashes) == 2
    assert not left.closed


def test_a_request_we_have_a_bug_with_is_answered(wire: Wires) -> None:
    def bug(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        fds.close()
        raise RuntimeError("planted")

    left, _ = wire.pair({}, {"on_request": bug})
    wait = left.call("OP")
    wire.pump()
    assert "internal error" in str(failed(wait))
    assert len(wire.crashes) == 1


def test_one_who_takes_the_end_badly_does_not_keep_it_from_the_others(wire: Wires) -> None:
    ended: list[str] = []

    def bug(_: object) -> None:
        raise RuntimeError("planted")

    left, raw = wire.raw(on_close=lambda channel: ended.append(channel.name))
    waits = [left.call("OP") for _ in range(3)]
    waits[0].on_done(bug)
    waits[1].on_done(bug)
    waits[1].on_done(lambda wait: ended.append("behind a bug"))
    raw.sock.close()
    wire.pump()
    assert all(isinstance(failed(wait), PeerGone) for wait in waits)
    assert ended == ["behind a bug", "left"]
    assert len(wire.crashes) == 2
