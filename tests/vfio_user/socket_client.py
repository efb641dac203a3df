"""A client over a real Unix socket: sends without waiting, as QEMU does, and reads answers as they come."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.patience import PATIENCE_S
from tests.vfio_user.messages import Sent


class SocketClient:
    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise

    def send(self, sent: Sent, fds: Sequence[int] = ()) -> None:
        assert len(fds) == sent.fds
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([sent.data], rights) == len(sent.data)

    def answer(self) -> tuple[int, int, bytes]:
        """Command, errno and body; ConnectionError when the server has hung up."""
        _, command, size, flags, errno = struct.unpack("<HHIII", self._exactly(16))
        assert flags & 0xF == 1
        assert bool(flags & 0x20) == bool(errno)
        return command, errno, self._exactly(size - 16)

    def ask(self, sent: Sent, fds: Sequence[int] = ()) -> tuple[int, bytes]:
        self.send(sent, fds)
        command, errno, body = self.answer()
        assert command == struct.unpack_from("<H", sent.data, 2)[0]
        return errno, body

    def _exactly(self, size: int) -> bytes:
        raw = b""
        while len(raw) < size:
            part = self.sock.recv(size - len(raw))
            if not part:
                raise ConnectionError("the server has hung up")
            raw += part
        return raw

    def is_hung_up_on(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()


def memory(size: int) -> int:
    """A memfd as QEMU's."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
