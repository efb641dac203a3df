"""What QEMU 11.1.3 said while Debian's 6.1 booted, bound idxd, copied ten times and let go, said again.

Recorded by `python -m tests.vfio_user.record`, between `python -m guest boot --run
pci,idxd,block_on_fault,dsa,dma,unbind` and `tests.vfio_user.serve_copying`.  Here nobody waits for an answer,
so all of it is pipelined.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.copying_server import CopyingServer
from tests.vfio_user.messages import POSTED, Sent
from tests.vfio_user.record import line_of, recorded
from tests.vfio_user.socket_client import SocketClient, memory

RECORD = Path(__file__).parents[1] / "vfio_user/qemu-11.1.3.txt"
DMA_MAP, SET_IRQS = 2, 8
RAM_BYTES = 256 << 20


def command(sent: Sent) -> int:
    return int.from_bytes(sent.data[2:4], "little")


@contextmanager
def files_of(sent: Sent, ram: int) -> Iterator[list[int]]:
    """As what it says needs them; all windows are of one file."""
    events = [os.eventfd(0) for _ in range(sent.fds)] if command(sent) == SET_IRQS else []
    yield events or [ram] * sent.fds
    for event in events:
        os.close(event)


def test_the_record_is_a_whole_one() -> None:
    order = recorded(RECORD)
    assert "".join(map(line_of, order)) == RECORD.read_text()
    assert {len(sent.data) - int.from_bytes(sent.data[4:8], "little") for sent in order} == {0}
    assert [command(sent) for sent in order[:4]] == [1, 2, 2, 4]
    assert {command(sent) for sent in order if sent.fds} == {DMA_MAP, SET_IRQS}


def test_every_message_is_answered_without_an_error_and_every_copy_is_made(tmp_path: Path) -> None:
    server, order, ram = CopyingServer(tmp_path), recorded(RECORD), memory(RAM_BYTES)
    client = SocketClient(server.path)
    for sent in order:
        with files_of(sent, ram) as fds:
            client.send(sent, fds)
    expected = [command(sent) for sent in order if not struct.unpack_from("<I", sent.data, 8)[0] & POSTED]
    answers = [client.answer() for _ in expected]
    assert [number for number, _, _ in answers] == expected
    assert {errno for _, errno, _ in answers} == {0}
    client.close()
    os.close(ram)
    seen = server.seen()
    assert (seen["moves"], seen["blocking"], seen["bytes"]) == (10, 10, 5 * (4096 + 2048))
