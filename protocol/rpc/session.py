"""Frames and conversations of one connection, as pure state: what was asked, what is answered.

A frame is an 8-byte header (body length, number of fds, kind) and a body the channel encodes.  Requests
carry an id their sender picks; replies name it and may overtake each other; a notify has id 0 and no
answer.

Invariant I12: every request is answered once.  A reply to nothing, a request id still in use, a body or fd
count past its limit: the peer broke the protocol (PeerError), and only that connection ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from protocol.errors import PeerError

HEADER = struct.Struct("<IHH")
HEADER_BYTES = HEADER.size
MAX_BODY_BYTES = 4 << 20
MAX_FDS = 8  # per message
MAX_IN_FLIGHT = 4096  # requests of one peer we have not answered, and ours it has not

T = TypeVar("T")


class Kind(IntEnum):
    REQUEST = 0
    REPLY = 1
    ERROR = 2
    NOTIFY = 3


KINDS = tuple(Kind)
_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much


class Frame(NamedTuple):
    kind: Kind
    nfds: int
    body: memoryview


def header(kind: Kind, body_bytes: int, nfds: int) -> bytes:
    assert body_bytes <= MAX_BODY_BYTES, f"message of {body_bytes} bytes (at most {MAX_BODY_BYTES})"
    assert nfds <= MAX_FDS, f"message with {nfds} fds (at most {MAX_FDS})"
    return HEADER.pack(body_bytes, nfds, kind)


class Framer:
    """Cuts a byte stream into frames; holds at most one partial frame."""

    __slots__ = ("_partial", "_wanted")

    def __init__(self) -> None:
        self._partial = bytearray()
        self._wanted = 0  # bytes that `_partial` must have before it is looked at again

    def feed(self, view: memoryview) -> Iterator[Frame]:
        """Frames completed by `view`, which the caller may reuse afterwards.  Raises PeerError on a header
        past a limit.  However small the pieces of a frame are, each is copied once.
        """
        if self._partial:
            self._partial += view
            if len(self._partial) < self._wanted:
                return
            view, self._partial = memoryview(self._partial), bytearray()
        at, end, wanted = 0, len(view), HEADER_BYTES
        while end - at >= HEADER_BYTES:
            body_bytes, nfds, kind = HEADER.unpack_from(view, at)
            if body_bytes > MAX_BODY_BYTES or nfds > MAX_FDS or kind >= len(KINDS):
                raise PeerError(f"header: {body_bytes} bytes, {nfds} fds, kind {kind}")
            stop = at + HEADER_BYTES + body_bytes
            if stop > end:
                wanted = stop - at
                break
            yield _new(Frame, (KINDS[kind], nfds, view[at + HEADER_BYTES : stop]))
            at = stop
        if at < end:
            self._partial += view[at:]
            self._wanted = wanted

    @property
    def partial_bytes(self) -> int:
        return len(self._partial)


class Session(Generic[T]):
    """Ids in use in both directions.  T is what the owner keeps for a request it has sent."""

    __slots__ = ("_next_id", "_sent", "_unanswered")

    def __init__(self) -> None:
        self._next_id = 1
        self._sent: dict[int, T] = {}
        self._unanswered: set[int] = set()

    def open(self, token: T) -> int:
        """An id for a request of ours.  Asserts the limit: callers bound what they have in flight."""
        assert len(self._sent) < MAX_IN_FLIGHT, f"{MAX_IN_FLIGHT} requests in flight"
        request_id = self._next_id
        self._next_id = request_id + 1
        self._sent[request_id] = token
        return request_id

    def answered(self, request_id: int) -> T:
        """The peer answers a request of ours.  Raises PeerError if we have no such request."""
        try:
            return self._sent.pop(request_id)
        except KeyError:
            raise PeerError(f"reply to request {request_id}, which is not open") from None

    def received(self, request_id: int) -> None:
        """The peer asks.  Raises PeerError on an id in use or too many unanswered."""
        if request_id in self._unanswered:
            raise PeerError(f"request id {request_id} is in use")
        if len(self._unanswered) >= MAX_IN_FLIGHT:
            raise PeerError(f"more than {MAX_IN_FLIGHT} requests in flight")
        self._unanswered.add(request_id)

    def answer(self, request_id: int) -> None:
        """We answer a request of the peer's; asserts that we do so once."""
        assert request_id in self._unanswered, f"request {request_id} answered twice"
        self._unanswered.discard(request_id)

    def owes(self, request_id: int) -> bool:
        """Whether the peer still waits for our answer."""
        return request_id in self._unanswered

    def abandon(self) -> list[T]:
        """The connection is gone: what we still waited for."""
        sent, self._sent = list(self._sent.values()), {}
        self._unanswered.clear()
        return sent

    @property
    def in_flight(self) -> int:
        return len(self._sent)
