"""A stream in any pieces gives the messages that were sent, each with its own fds."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import PeerError
from vfio_user.core.limits import MAX_MESSAGE_BODY_BYTES, MAX_MSG_FDS
from vfio_user.core.stream import ClientMessage, Header, MessageStream, reply_to


def raw(body: bytes, *, size: int | None = None, flags: int = 0) -> bytes:
    return struct.pack("<HHIII", 7, 9, 16 + len(body) if size is None else size, flags, 0) + body


@given(st.tuples(*[st.integers(0, (1 << bits) - 1) for bits in (16, 16, 32, 32, 32)]))
def test_a_header_survives_its_bytes(fields: tuple[int, int, int, int, int]) -> None:
    assert Header(*fields).to_bytes() == struct.pack("<HHIII", *fields)
    assert Header.from_bytes(Header(*fields).to_bytes()) == fields


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
)
def test_pipelined_messages_keep_their_own_fds(sent: list[tuple[bytes, int]], pieces: list[int]) -> None:
    stream, found, turn, next_fd = MessageStream(lambda fd: None), list[ClientMessage](), 0, 100
    for body, count in sent:
        fds = list(range(next_fd, next_fd + count))
        next_fd += count
        rest = raw(body)
        while rest:
            take = min(pieces[turn % len(pieces)], stream.wanted)
            turn += 1
            message = stream.feed(rest[:take], fds)
            rest, fds = rest[take:], []
            found += [message] if message else []
    assert [(message.body, len(message.fds)) for message in found] == sent
    assert [fd for message in found for fd in message.fds] == list(range(100, next_fd))


@pytest.mark.parametrize("size", [0, 15, 16 + MAX_MESSAGE_BODY_BYTES + 1, (1 << 32) - 1])
def test_a_size_that_cannot_be_ends_the_client(size: int) -> None:
    with pytest.raises(PeerError, match="bytes"):
        MessageStream(lambda fd: None).feed(raw(b"", size=size))


@pytest.mark.parametrize("size", [16, 16 + MAX_MESSAGE_BODY_BYTES])
def test_a_size_at_the_limit_is_waited_for(size: int) -> None:
    stream = MessageStream(lambda fd: None)
    assert (stream.feed(raw(b"", size=size)) is None) == (size > 16)
    assert stream.wanted == (size - 16 or 16)


@pytest.mark.parametrize("flags", [1, 2, 0xF, 0x20, 0x21, 0x40, 1 << 31])
def test_flags_that_no_command_has_end_the_client(flags: int) -> None:
    with pytest.raises(PeerError, match="flags"):
        MessageStream(lambda fd: None).feed(raw(b"", flags=flags))


def test_fds_that_never_got_a_message_are_closed() -> None:
    closed = list[int]()
    stream = MessageStream(closed.append)
    stream.feed(raw(b"body")[:16], [5, 6])
    stream.feed(b"bo")
    with pytest.raises(PeerError, match="with the body"):
        stream.feed(b"d", [7])
    stream.close()
    assert sorted(closed) == [5, 6, 7]


def test_one_fd_too_many_ends_the_client() -> None:
    fds = list(range(MAX_MSG_FDS + 1))
    message = MessageStream(lambda fd: None).feed(raw(b""), fds[:-1])
    assert message is not None
    assert message.fds == fds[:-1]
    with pytest.raises(PeerError, match="fds"):
        MessageStream(lambda fd: None).feed(raw(b""), fds)


def test_an_error_is_a_header_alone() -> None:
    message = ClientMessage(0x1234, 9, True, b"what was asked")
    assert reply_to(message, errno=22) == struct.pack("<HHIII", 0x1234, 9, 16, 0x21, 22)
    assert reply_to(message, b"data") == struct.pack("<HHIII", 0x1234, 9, 20, 1, 0) + b"data"
