"""Channels over real socketpairs: conversations, file descriptors, and peers that break the rules.

Every test ends with a count of the process's fds: invariant I14 is that none is lost or leaked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket

import pytest

from protocol.errors import UapiError
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Body, Channel, Fds, PeerGone, Reply
from protocol.rpc.session import MAX_BODY_BYTES, MAX_FDS
from tests.patience import PATIENCE_S
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


def silent(channel: Channel, number: int, body: Body, fds: Fds) -> None:
    fds.close()


ECHO = {"on_request": echo}


def a_pipe() -> tuple[int, int]:
    return os.pipe()


# -- conversations -------------------------------------------------------------------------------------


def test_a_call_gets_the_answer_to_itself(wire: Wires) -> None:
    left, _ = wire.pair(other=ECHO)
    waits = [left.call("OP", {"n": i, "data": b"\0" * i}) for i in range(50)]
    wire.pump()
    assert [wait.result().body for wait in waits] == [
        {"op": "OP", "n": i, "data": b"\0" * i} for i in range(50)
    ]


def test_answers_may_overtake_each_other(wire: Wires) -> None:
    asked: list[tuple[int, Body]] = []
    left, right = wire.pair(other={"on_request": lambda c, number, body, fds: asked.append((number, body))})
    waits = [left.call("OP", {"n": i}) for i in range(3)]
    wire.pump()
    for number, body in reversed(asked):
        right.answer(number, {"was": body["n"]})
    wire.pump()
    assert [wait.result().body["was"] for wait in waits] == [0, 1, 2]


def test_an_error_comes_back_as_errno_and_sentence(wire: Wires) -> None:
    def refuse(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        channel.answer_error(number, UapiError(errno.EBUSY, "taken"))

    left, _ = wire.pair(other={"on_request": refuse})
    wait = left.call("OP")
    wire.pump()
    error = failed(wait)
    assert isinstance(error, UapiError)
    assert (error.errno, error.why) == (errno.EBUSY, "taken")


def test_a_notification_arrives_in_order_and_has_no_answer(wire: Wires) -> None:
    told: list[int] = []
    left, right = wire.pair(other={"on_notify": lambda c, body, fds: told.append(body["n"])})
    for i in range(20):
        left.notify("TELL", {"n": i})
    wire.pump()
    assert told == list(range(20))
    assert not left.closed
    assert not right.closed


def test_both_ends_may_ask_at_once_and_ask_back_before_they_answer(wire: Wires) -> None:
    """Each end answers a request only after the other has answered its own question [RFC 27/42]."""

    def ask_back(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        depth = body["depth"]
        if depth == 0:
            channel.answer(number, {"depth": 0})
            return
        back = channel.call("OP", {"depth": depth - 1})
        back.on_done(lambda wait: channel.answer(number, {"depth": wait.result().body["depth"] + 1}))

    left, right = wire.pair({"on_request": ask_back}, {"on_request": ask_back})
    waits = [end.call("OP", {"depth": 5}) for end in (left, right) for _ in range(50)]
    wire.pump()
    assert [wait.result().body["depth"] for wait in waits] == [5] * 100


def test_two_ends_that_send_more_than_the_socket_holds_do_not_block_each_other(wire: Wires) -> None:
    left, right = wire.pair(ECHO, ECHO)
    big = b"x" * (1 << 20)
    waits = [end.call("OP", {"data": big}) for end in (left, right) for _ in range(6)]
    wire.pump()
    assert all(wait.result().body["data"] == big for wait in waits)


def test_the_largest_body_passes(wire: Wires) -> None:
    left, _ = wire.pair(other=ECHO)
    overhead = len(frame(REQUEST, 1, {"op": "OP", "data": b"x" * (1 << 16)})) - 8 - (1 << 16)
    wait = left.call("OP", {"data": b"x" * (MAX_BODY_BYTES - overhead)})
    wire.pump()
    assert len(wait.result().body["data"]) == MAX_BODY_BYTES - overhead
    with pytest.raises(AssertionError, match="at most"):
        left.call("OP", {"data": b"x" * (MAX_BODY_BYTES - overhead + 1)})


# -- file descriptors ----------------------------------------------------------------------------------


def test_fds_travel_with_their_message(wire: Wires) -> None:
    """Between messages without fds, in order, each batch with the frame that announced it."""
    seen: list[tuple[int, list[int]]] = []

    def keep(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        inodes = []
        for i in range(len(fds)):
            fd = fds.take(i)
            inodes.append(os.fstat(fd).st_ino)
            os.close(fd)
        seen.append((body["n"], inodes))
        channel.answer(number, {})

    left, _ = wire.pair(other={"on_request": keep})
    expected = []
    for n, count in enumerate([0, 2, 1, 0, 0, MAX_FDS, 1, 0, 3]):
        fds = [os.memfd_create("x") for _ in range(count)]
        expected.append((n, [os.fstat(fd).st_ino for fd in fds]))
        left.call("OP", {"n": n, "pad": b"x" * 300}, fds)
    wire.pump()
    assert seen == expected


def test_an_fd_received_is_the_same_open_file_and_not_inherited(wire: Wires) -> None:
    got: list[int] = []

    def keep(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        got.append(fds.take(0))
        channel.answer(number, {})

    left, _ = wire.pair(other={"on_request": keep})
    reader, writer = a_pipe()
    left.call("OP", fds=[writer])
    wire.pump()
    os.write(got[0], b"through")
    assert os.get_inheritable(got[0]) is False
    os.close(got[0])
    assert os.read(reader, 100) == b"through"
    assert os.read(reader, 100) == b"", "our copy was closed once sent"
    os.close(reader)


def test_an_answer_carries_fds_back(wire: Wires) -> None:
    def give(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        reader, writer = a_pipe()
        os.write(writer, b"hello")
        os.close(writer)
        channel.answer(number, {}, [reader])

    left, _ = wire.pair(other={"on_request": give})
    wait = left.call("OP")
    wire.pump()
    fd = wait.result().fds.take(0)
    assert os.read(fd, 10) == b"hello"
    os.close(fd)


@pytest.mark.parametrize("kind", ["request", "notify", "reply"])
def test_fds_nobody_takes_are_closed(wire: Wires, kind: str) -> None:
    def give(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        channel.answer(number, {}, [os.memfd_create("x")])
        fds.close()

    left, _ = wire.pair(other={"on_request": give, "on_notify": lambda c, body, fds: None})
    before = len(open_fds())
    for _ in range(20):
        if kind == "notify":
            left.notify("OP", fds=[os.memfd_create("x")])
        else:
            fds = [os.memfd_create("x")] if kind == "request" else []
            left.call("OP", fds=fds).on_done(lambda wait: wait.result().fds.close())
    wire.pump()
    assert len(open_fds()) == before


def test_an_fd_is_taken_once() -> None:
    reader, writer = a_pipe()
    fds = Fds(LINUX, [reader, writer])
    assert fds.peek(0) == reader
    assert fds.take(0) == reader
    for index in (0, 2, -1):
        with pytest.raises(UapiError) as caught:
            fds.take(index)
        assert caught.value.errno == errno.EBADF
    os.fstat(reader)
    os.close(reader)
    fds.close()
    assert writer not in open_fds()


def test_fds_given_to_a_closed_channel_are_closed(wire: Wires) -> None:
    left, right = wire.pair(other=ECHO)
    right.close()
    wire.pump()
    assert left.closed
    before = open_fds()
    wait = left.call("OP", fds=[os.memfd_create("x")])
    left.notify("OP", fds=[os.memfd_create("x")])
    left.answer(1, {}, [os.memfd_create("x")])
    assert isinstance(failed(wait), PeerGone)
    assert open_fds() == before


def test_fds_not_sent_yet_are_closed_when_the_peer_goes(wire: Wires) -> None:
    left, raw = wire.raw()
    left.call("OP", {"data": b"x" * (1 << 20)})
    wait = left.call("OP", fds=[os.memfd_create("x")])
    wire.pump()
    raw.sock.close()
    wire.pump()
    assert isinstance(failed(wait), PeerGone)


# -- when our fd table is full -------------------------------------------------------------------------


class full_table:
    """No fd is free while it lasts, but `spare`."""

    def __init__(self, spare: int = 0) -> None:
        self.spare = spare
        self.filled: list[int] = []

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, self.limits[1]))
        with contextlib.suppress(OSError):
            while True:
                self.filled.append(os.open("/dev/null", os.O_RDONLY))
        assert len(self.filled) > 10
        for _ in range(self.spare):
            os.close(self.filled.pop())

    def __exit__(self, *_: object) -> None:
        for fd in self.filled:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_fds_there_is_no_room_for_are_answered_emfile_and_none_leaks(wire: Wires, spare: int) -> None:
    left, raw = wire.raw(on_request=echo)
    sent = [os.memfd_create("x") for _ in range(3)]
    raw.send(frame(REQUEST, 1, {"op": "A"}))
    raw.send(frame(REQUEST, 2, {"op": "B"}, 3), sent)
    raw.send(frame(REQUEST, 3, {"op": "C"}))
    with full_table(spare):
        wire.pump()
    for fd in sent:
        os.close(fd)
    answers = {number: (kind, body) for kind, _, number, body in raw.frames()}
    assert answers[1][0] == answers[3][0] == REPLY
    assert answers[2][0] == ERROR
    assert answers[2][1]["errno"] == errno.EMFILE
    assert not left.closed


def test_after_a_full_table_fds_arrive_again(wire: Wires) -> None:
    _, raw = wire.raw(on_request=echo)
    fd = os.memfd_create("x")
    raw.send(frame(REQUEST, 1, {}, 1), [fd])
    with full_table():
        wire.pump()
    raw.send(frame(REQUEST, 2, {}, 1), [fd])
    wire.pump()
    os.close(fd)
    assert [kind for kind, *_ in raw.frames()] == [ERROR, REPLY]


def test_a_full_table_loses_the_fds_of_one_message_only(wire: Wires) -> None:
    """Those of the frame before it had come."""
    got: list[tuple[int, int]] = []

    def keep(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        got.append((number, len(fds)))
        echo(channel, number, body, fds)

    _, raw = wire.raw(on_request=keep)
    fd = os.memfd_create("x")
    first, second = frame(REQUEST, 1, {"pad": b"x" * 50}, 1), frame(REQUEST, 2, {}, 1)
    raw.send(first, [fd])
    wire.pump()
    raw.send(second, [fd])
    with full_table():
        wire.pump()
    os.close(fd)
    assert got == [(1, 1)]
    assert [(kind, number) for kind, _, number, _ in raw.frames()] == [(REPLY, 1), (ERROR, 2)]


def test_a_reply_whose_fd_is_lost_fails_with_emfile(wire: Wires) -> None:
    left, raw = wire.raw()
    wait = left.call("OP")
    wire.pump()
    fd = os.memfd_create("x")
    raw.send(frame(REPLY, 1, {}, 1), [fd])
    os.close(fd)
    with full_table():
        wire.pump()
    error = failed(wait)
    assert isinstance(error, UapiError)
    assert error.errno == errno.EMFILE
    assert not left.closed


# -- the end -------------------------------------------------------------------------------------------


def test_what_was_asked_of_a_peer_that_dies_fails_and_the_end_is_told_once(wire: Wires) -> None:
    ends: list[Channel] = []
    left, right = wire.pair({"on_close": ends.append}, {"on_request": silent})
    waits = [left.call("OP") for _ in range(3)]
    wire.pump()
    right.close()
    wire.pump()
    left.close()
    assert ends == [left]
    assert all(isinstance(failed(wait), PeerGone) for wait in waits)


def test_what_was_sent_before_a_peer_hung_up_is_still_served(wire: Wires) -> None:
    told: list[int] = []
    _, raw = wire.raw(on_notify=lambda c, body, fds: told.append(body["n"]))
    raw.send(frame(NOTIFY, 0, {"n": 1}) + frame(NOTIFY, 0, {"n": 2}))
    raw.sock.close()
    wire.pump()
    assert told == [1, 2]


def test_a_handler_may_close_its_own_channel(wire: Wires) -> None:
    told: list[int] = []

    def last(channel: Channel, body: Body, fds: Fds) -> None:
        told.append(body["n"])
        channel.close()

    left, raw = wire.raw(on_notify=last)
    raw.send(frame(NOTIFY, 0, {"n": 1}) + frame(NOTIFY, 0, {"n": 2}))
    wire.pump()
    assert told == [1]
    assert left.closed


def test_an_exception_of_ours_is_reported_and_the_frames_behind_it_are_served(wire: Wires) -> None:
    told: list[int] = []

    def crash(channel: Channel, body: Body, fds: Fds) -> None:
        told.append(body["n"])
        if body["n"] == 1:
            raise ZeroDivisionError

    left, raw = wire.raw(on_notify=crash)
    fd = os.memfd_create("x")
    last = frame(NOTIFY, 0, {"n": 3})
    raw.send(frame(NOTIFY, 0, {"n": 1}, 1), [fd])
    raw.send(frame(NOTIFY, 0, {"n": 2}) + last[:5])
    wire.pump()
    raw.send(last[5:])
    wire.pump()
    os.close(fd)
    assert told == [1, 2, 3]
    assert [type(crash) for crash in wire.crashes] == [ZeroDivisionError]
    assert not left.closed


async def test_a_trio_task_asks_and_one_that_gives_up_leaks_no_fd() -> None:
    import trio

    with wires() as wire:
        asked: list[int] = []
        left, right = wire.pair(other={"on_request": lambda c, number, body, fds: asked.append(number)})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.loop.serve)
            with trio.move_on_after(0.02) as scope:
                await left.ask("OP")
            assert scope.cancelled_caught
            right.answer(asked[0], {}, [os.memfd_create("x")])
            wait = left.call("SECOND")
            with trio.fail_after(PATIENCE_S):
                while len(asked) < 2:
                    await trio.lowlevel.checkpoint()
            right.answer(asked[1], {"n": 2})
            reply: Reply = await wire.loop.result(wait)
            assert reply.body == {"n": 2}
            nursery.cancel_scope.cancel()
        left.close()
        right.close()


def test_every_prefix_of_a_conversation_then_a_hang_up_leaves_nothing_behind(wire: Wires) -> None:
    fd = os.memfd_create("x")
    data = frame(REQUEST, 1, {"a": 1}, 2) + frame(REQUEST, 2, {"b": b"x" * 30})
    before = len(open_fds())
    for cut in range(1, len(data)):
        one, two = socket.socketpair()
        made = wire.channel(one, "cut", ECHO)
        socket.send_fds(two, [data[:cut]], [fd, fd])
        two.close()
        wire.pump()
        assert made.closed
        assert len(open_fds()) == before
    os.close(fd)
