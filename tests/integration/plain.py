"""A peer without manners: a bare socket, frames written by hand, replies read only when it pleases."""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path
from typing import Any

import msgpack

from tests.patience import PATIENCE_S

REQUEST, REPLY, ERROR, NOTIFY = range(4)
HEADER = struct.Struct("<IHH")


def frame(kind: int, number: object, body: object, nfds: int = 0) -> bytes:
    payload: bytes = msgpack.packb((number, body))
    return HEADER.pack(len(payload), nfds, kind) + payload


class Plain:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held: list[socket.socket] = []  # closed with it
        sock.settimeout(PATIENCE_S)
        self._next = 1

    @classmethod
    def connect(cls, path: Path) -> Plain:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return cls(sock)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """All of it, or as much as goes out before the daemon hangs up."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], rights)
            self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            pass

    def ask(self, op: str, body: dict[str, Any] | None = None, fds: list[int] | None = None) -> Any:
        """(body, fds) of the reply; the errno of an error as an int."""
        self._next += 1
        self.send(frame(REQUEST, self._next, {"op": op, **(body or {})}, len(fds or ())), fds)
        kind, number, answer, got = self.receive()
        assert number == self._next
        return answer["errno"] if kind == ERROR else (answer, got)

    def open(self, op: str, body: dict[str, Any] | None = None, fds: list[int] | None = None) -> Plain:
        """The object whose fd the reply carries."""
        _, got = self.ask(op, body, fds)
        return Plain(socket.socket(fileno=got[0]))

    def receive(self) -> tuple[int, int, Any, list[int]]:
        data, fds = b"", list[int]()
        while len(data) < HEADER.size:
            data += self._recv(HEADER.size - len(data), fds)
        size, _, kind = HEADER.unpack(data)
        payload = b""
        while len(payload) < size:
            payload += self._recv(size - len(payload), fds)
        number, body = msgpack.unpackb(payload)
        return kind, number, body, fds

    def _recv(self, size: int, fds: list[int]) -> bytes:
        data, new, _, _ = socket.recv_fds(self.sock, size, 16)
        fds += new
        assert data, "the daemon hung up"
        return data

    def hung_up(self) -> bool:
        """Reads until the daemon hangs up; False if it does not."""
        try:
            while data := self.sock.recvmsg(1 << 16, 4096):
                for _, _, raw in data[1]:
                    fds = array.array("i")
                    fds.frombytes(raw)
                    for fd in fds:
                        os.close(fd)
                if not data[0]:
                    return True
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True
        return True

    def copy(self) -> int:
        return os.dup(self.sock.fileno())

    def close(self) -> None:
        self.sock.close()
        while self.held:
            self.held.pop().close()
