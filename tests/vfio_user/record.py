"""`python -m tests.vfio_user.record PATH SERVER FILE`: between client and server, keeps what the client says.

Listens at PATH for one client, passes all of it on to the server at SERVER, fds too, until one of the two
hangs up.  FILE gets a line a message, as hexadecimal, with a number before it if fds came along:

    0200 ...
    1+0500 ...
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.vfio_user.messages import Sent

HEADER_BYTES: Final = 16
_MOST_FDS: Final = 64
_READ_BYTES: Final = 64 << 10


def recorded(path: Path) -> list[Sent]:
    found = []
    for line in path.read_text().splitlines():
        fds, _, data = line.rpartition("+")
        found.append(Sent(bytes.fromhex(data), int(fds or 0)))
    return found


def line_of(sent: Sent) -> str:
    return (f"{sent.fds}+" if sent.fds else "") + sent.data.hex() + "\n"


def _take(stream: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Exactly so much, with the fds of it; less at the stream's end."""
    data, fds = b"", list[int]()
    while len(data) < count:
        part, new, _, _ = socket.recv_fds(stream, count - len(data), _MOST_FDS)
        if not part:
            break
        data, fds = data + part, [*fds, *new]
    return data, fds


def messages_of(stream: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    while True:
        header, fds = _take(stream, HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return
        body, none = _take(stream, int.from_bytes(header[4:8], "little") - HEADER_BYTES)
        assert not none, "fds come with a header"
        yield header + body, fds


def _answer(server: socket.socket, client: socket.socket) -> None:
    while data := server.recv(_READ_BYTES):
        client.sendall(data)
    client.shutdown(socket.SHUT_RDWR)


def main(path: str, server_path: str, file: str) -> int:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as server:
        listener.bind(path)
        listener.listen(1)
        client, _ = listener.accept()
        server.connect(server_path)
        answers = threading.Thread(target=_answer, args=(server, client))
        answers.start()
        with client, Path(file).open("w") as lines:
            for data, fds in messages_of(client):
                lines.write(line_of(Sent(data, len(fds))))
                socket.send_fds(server, [data], fds)
                for fd in fds:
                    socket.close(fd)
            server.shutdown(socket.SHUT_RDWR)
            answers.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
