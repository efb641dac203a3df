"""Frames and ids: limits at and past, and a stream cut anywhere."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import PeerError
from protocol.rpc.session import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    MAX_FDS,
    MAX_IN_FLIGHT,
    Framer,
    Kind,
    Session,
    header,
)

Plain = tuple[int, int, bytes]


def feed(framer: Framer, data: bytes) -> list[Plain]:
    return [(frame.kind, frame.nfds, bytes(frame.body)) for frame in framer.feed(memoryview(data))]


def test_a_header_is_length_fds_kind() -> None:
    assert header(Kind.ERROR, 0x01_0203, 5) == bytes([0x03, 0x02, 0x01, 0x00, 5, 0, 2, 0])


STREAM = b"".join(
    struct.pack("<IHH", len(body), nfds, kind) + body
    for body, nfds, kind in ((b"abc", 0, 0), (b"", 8, 1), (b"x" * 20, 1, 3))
)
EXPECTED: list[Plain] = [(0, 0, b"abc"), (1, 8, b""), (3, 1, b"x" * 20)]


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_a_stream_cut_at_any_byte_gives_the_same_frames(at: int) -> None:
    framer = Framer()
    assert feed(framer, STREAM[:at]) + feed(framer, STREAM[at:]) == EXPECTED
    assert framer.partial_bytes == 0


def test_a_stream_that_comes_byte_by_byte_gives_the_same_frames() -> None:
    framer = Framer()
    assert [frame for i in range(len(STREAM)) for frame in feed(framer, STREAM[i : i + 1])] == EXPECTED


def test_a_frame_in_small_pieces_is_not_copied_again_for_each() -> None:
    """A peer that sends 4 MiB byte by byte has us copy 4 MiB."""
    framer, stream = Framer(), header(Kind.REQUEST, 4096, 0) + bytes(4096)
    assert feed(framer, stream[:HEADER_BYTES]) == []
    held = framer._partial
    assert [
        frame for i in range(HEADER_BYTES, len(stream) - 1) for frame in feed(framer, stream[i : i + 1])
    ] == []
    assert framer._partial is held
    assert feed(framer, stream[-1:]) == [(0, 0, bytes(4096))]


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, MAX_FDS), st.binary(max_size=300))), st.data()
)
def test_any_frames_survive_any_cuts(frames: list[tuple[Kind, int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(header(kind, len(body), nfds) + body for kind, nfds, body in frames)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=6)))
    framer, got = Framer(), list[Plain]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += feed(framer, stream[start:end])
    assert got == [(kind, nfds, body) for kind, nfds, body in frames]


@pytest.mark.parametrize(
    ("size", "nfds", "kind", "legal"),
    [
        (MAX_BODY_BYTES, 0, 0, True),
        (MAX_BODY_BYTES + 1, 0, 0, False),
        (0xFFFF_FFFF, 0, 0, False),
        (0, MAX_FDS, 3, True),
        (0, MAX_FDS + 1, 3, False),
        (0, 0, 4, False),
        (0, 0, 0xFFFF, False),
    ],
)
def test_a_header_past_a_limit_ends_the_connection(size: int, nfds: int, kind: int, legal: bool) -> None:
    framer = Framer()
    data = struct.pack("<IHH", size, nfds, kind)
    if legal:
        feed(framer, data)
    else:
        with pytest.raises(PeerError):
            feed(framer, data)


@pytest.mark.parametrize(("size", "nfds"), [(MAX_BODY_BYTES + 1, 0), (0, MAX_FDS + 1)])
def test_a_frame_of_ours_past_a_limit_is_a_bug(size: int, nfds: int) -> None:
    with pytest.raises(AssertionError, match="at most"):
        header(Kind.REPLY, size, nfds)


def test_replies_may_overtake_each_other() -> None:
    session: Session[str] = Session()
    ids = [session.open(name) for name in "abc"]
    assert len(set(ids)) == 3
    assert [session.answered(ids[i]) for i in (2, 0, 1)] == ["c", "a", "b"]
    assert session.in_flight == 0


def test_an_id_is_never_used_again() -> None:
    session: Session[int] = Session()
    seen = set()
    for i in range(100):
        number = session.open(i)
        session.answered(number)
        seen.add(number)
    assert len(seen) == 100


def test_a_reply_to_nothing_or_a_second_one_ends_the_connection() -> None:
    session: Session[str] = Session()
    number = session.open("a")
    with pytest.raises(PeerError, match="not open"):
        session.answered(number + 1)
    session.answered(number)
    with pytest.raises(PeerError, match="not open"):
        session.answered(number)


def test_a_request_id_in_use_ends_the_connection_and_may_come_again_once_answered() -> None:
    session: Session[None] = Session()
    session.received(7)
    with pytest.raises(PeerError, match="in use"):
        session.received(7)
    session.answer(7)
    session.received(7)


def test_the_request_past_the_limit_ends_the_connection() -> None:
    session: Session[None] = Session()
    for i in range(MAX_IN_FLIGHT):
        session.received(i)
    with pytest.raises(PeerError, match="in flight"):
        session.received(MAX_IN_FLIGHT)
    session.answer(0)
    session.received(MAX_IN_FLIGHT)


def test_answering_twice_is_a_bug() -> None:
    session: Session[None] = Session()
    session.received(1)
    session.answer(1)
    with pytest.raises(AssertionError, match="twice"):
        session.answer(1)


def test_asking_past_the_limit_is_a_bug() -> None:
    session: Session[int] = Session()
    for i in range(MAX_IN_FLIGHT):
        session.open(i)
    with pytest.raises(AssertionError, match="in flight"):
        session.open(0)


def test_the_end_gives_back_what_was_waited_for() -> None:
    session: Session[str] = Session()
    first, _ = session.open("a"), session.open("b")
    session.answered(first)
    session.received(9)
    assert session.abandon() == ["b"]
    assert session.abandon() == []
