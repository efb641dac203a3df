"""Messages out of a stream: sixteen bytes of header, then the body [vfio-user Header].

A client sends message after message without waiting, some with fds, and a stream socket gives out the bytes
of several at once, with the fds of the last [QEMU hw/vfio-user/proxy.c].  So whoever reads asks for no more
than `wanted`, the rest of one header or of one body, and an fd belongs to the message whose header it came
with.  Must hold:
  - a damaged header is a PeerError: where the next message begins is not known any more;
  - no body is waited for that is longer than MAX_MESSAGE_BODY_BYTES;
  - every fd that came is in one message, or closed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from protocol.errors import PeerError
from vfio_user.core.limits import MAX_MESSAGE_BODY_BYTES, MAX_MSG_FDS

_HEADER: Final = struct.Struct("<HHIII")
MESSAGE_HEADER_BYTES: Final = _HEADER.size
TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0x0
TYPE_REPLY: Final = 0x1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20


class ClientCommand(IntEnum):
    """What a client may ask; DIRTY_PAGES is of an older edition, which QEMU still has a number for."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Header(NamedTuple):
    """`size` is of the whole message, in bytes; `error` an errno, of a reply with ERROR alone."""

    message_id: int
    command: int
    size: int
    flags: int
    error: int = 0

    def to_bytes(self) -> bytes:
        return _HEADER.pack(*self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Header:
        return cls(*_HEADER.unpack(raw))


@dataclass(slots=True)
class ClientMessage:
    """A command as it came: a number that may mean nothing, a body nobody has looked at.  Who takes an fd
    out of `fds` closes it.
    """

    message_id: int
    command: int
    wants_reply: bool
    body: bytes
    fds: list[int] = field(default_factory=list)


def reply_to(message: ClientMessage, payload: bytes = b"", errno: int = 0) -> bytes:
    """The bytes of the answer; an error's is a header alone."""
    flags = TYPE_REPLY | (ERROR if errno else 0)
    size = MESSAGE_HEADER_BYTES + len(payload)
    return Header(message.message_id, message.command, size, flags, errno).to_bytes() + payload


def check_header(header: Header) -> None:
    """PeerError for what is no command of a client, or longer than anything a client has to say."""
    if header.flags & ~NO_REPLY != TYPE_COMMAND:
        raise PeerError(f"message {header.message_id}: flags {header.flags:#x} are no command's")
    if not MESSAGE_HEADER_BYTES <= header.size <= MESSAGE_HEADER_BYTES + MAX_MESSAGE_BODY_BYTES:
        raise PeerError(f"message {header.message_id}: {header.size} bytes")


class MessageStream:
    """`close_fd` closes what came and belongs to nobody."""

    def __init__(self, close_fd: Callable[[int], None]) -> None:
        self._close_fd = close_fd
        self._received = bytearray()
        self._header: Header | None = None
        self._fds: list[int] = []
        self.wanted = MESSAGE_HEADER_BYTES
        """How many bytes to receive at most; never 0."""

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> ClientMessage | None:
        """What one receive gave; the message it completes.  PeerError: read no more of this client."""
        assert len(data) <= self.wanted, f"{len(data)} bytes received, {self.wanted} were wanted"
        self._fds += fds
        if fds and self._header is not None:
            raise PeerError(f"{len(fds)} fds came with the body of a message")
        if len(self._fds) > MAX_MSG_FDS:
            raise PeerError(f"{len(self._fds)} fds came with one message, at most {MAX_MSG_FDS}")
        self._received += data
        self.wanted -= len(data)
        if self.wanted == 0 and self._header is None:
            self._header = Header.from_bytes(bytes(self._received))
            check_header(self._header)
            self._received.clear()
            self.wanted = self._header.size - MESSAGE_HEADER_BYTES
        return self._completed() if self.wanted == 0 else None

    def _completed(self) -> ClientMessage:
        assert self._header is not None
        header, body, fds = self._header, bytes(self._received), self._fds
        self._header, self._fds, self.wanted = None, [], MESSAGE_HEADER_BYTES
        self._received.clear()
        return ClientMessage(header.message_id, header.command, not header.flags & NO_REPLY, body, fds)

    def close(self) -> None:
        """Of a message that never became whole."""
        while self._fds:
            self._close_fd(self._fds.pop())
