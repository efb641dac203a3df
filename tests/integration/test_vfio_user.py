"""A vfio-user server as a process: QEMU's order with real fds, and clients that misbehave."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from errno import EINVAL, EIO
from pathlib import Path
from random import Random

import pytest

from tests.kit.daemons import until
from tests.patience import PATIENCE_S
from tests.vfio_user import messages
from tests.vfio_user.fuzz import BESIDE, MUTATIONS
from tests.vfio_user.messages import (
    EVENTFDS,
    Sent,
    dma_map,
    get_info,
    qemu_boot,
    region_write,
    set_irqs,
    version,
)
from tests.vfio_user.serve_plain import BUG, DOORBELL
from tests.vfio_user.socket_client import SocketClient, memory


class PlainServer:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "function.sock"
        self._clients: list[SocketClient] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.vfio_user.serve_plain", str(self.path)],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        until(self.path.exists, "the server listens")
        first = SocketClient(self.path)
        assert first.ask(version())[0] == 0
        self._at_rest = len(self.fds()) - 1  # but for the first client's socket
        first.close()

    def fds(self) -> list[str]:
        """What is open."""
        names = Path(f"/proc/{self._process.pid}/fd")
        found = []
        for name in os.listdir(names):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(names / name))
        return found

    def nothing_is_left(self) -> None:
        """Of clients that are gone."""
        until(lambda: len(self.fds()) == self._at_rest, "every fd of a client is closed")

    def let_go(self) -> None:
        """Of clients a test that failed left."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def client(self) -> SocketClient:
        """Has said its version.  Whoever was there before may need a moment to be gone."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            client = SocketClient(self.path)
            try:
                assert client.ask(version())[0] == 0
            except ConnectionError:
                client.close()
                assert time.monotonic() < deadline, "the function has a client that does not go"
                time.sleep(0.01)
            else:
                self._clients.append(client)
                return client

    def stop(self) -> int:
        """Its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def shared() -> Iterator[PlainServer]:
    """One process for all of these: what one client does must not reach the next."""
    with tempfile.TemporaryDirectory() as directory:
        running = PlainServer(Path(directory))
        yield running
        assert running.stop() == 0, "nothing of it was a mistake of the server's"


@pytest.fixture
def server(shared: PlainServer) -> Iterator[PlainServer]:
    yield shared
    shared.let_go()
    shared.nothing_is_left()


def files_for(sent: Sent) -> list[int]:
    command = struct.unpack_from("<H", sent.data, 2)[0]
    return [os.eventfd(0) if command == 8 else memory(4096) for _ in range(sent.fds)]


def send_with_files(client: SocketClient, sent: Sent) -> None:
    fds = files_for(sent)
    try:
        client.send(sent, fds)
    finally:
        for fd in fds:
            os.close(fd)


def test_qemus_order_sent_at_once_is_answered_in_order(server: PlainServer) -> None:
    client = server.client()
    order = qemu_boot()[1:]
    for sent in order:
        send_with_files(client, sent)
    expected = [struct.unpack_from("<H", sent.data, 2)[0] for sent in order if not sent.data[8] & 0x10]
    answers = [client.answer() for _ in expected]
    assert [command for command, _, _ in answers] == expected
    assert [errno for _, errno, _ in answers] == [0] * len(answers)
    config = next(body[16:] for command, _, body in answers if command == 9 and len(body) > 4096)
    assert config[:4] == bytes.fromhex("86 80 25 0b")
    client.close()


def test_each_pipelined_map_keeps_the_fd_it_came_with(server: PlainServer) -> None:
    client = server.client()
    for n in range(40):
        send_with_files(client, dma_map(n << 12, 4096, fds=n % 3 and 1))
    assert [client.answer()[1] for _ in range(40)] == [0] * 40
    until(lambda: sum("memfd:ram" in name for name in server.fds()) == 26, "every window has its file")
    for n in range(0, 40, 2):
        assert client.ask(messages.dma_unmap(n << 12, 4096))[0] == 0
    until(lambda: sum("memfd:ram" in name for name in server.fds()) == 13, "half of the files are closed")
    client.close()


def test_an_interrupt_reaches_the_eventfd_of_its_vector(server: PlainServer) -> None:
    client = server.client()
    assert client.ask(messages.device_reset())[0] == 0  # what is pending stays from one client to the next
    first, second = os.eventfd(0), os.eventfd(0)
    assert client.ask(set_irqs(EVENTFDS, 3, 2, fds=2), [first, second])[0] == 0
    client.send(region_write(2, DOORBELL, struct.pack("<Q", 4), flags=messages.POSTED))
    assert os.eventfd_read(second) == 1
    assert client.ask(set_irqs(EVENTFDS, 4, 1))[0] == 0
    assert client.ask(region_write(2, DOORBELL, struct.pack("<Q", 4)))[0] == 0
    assert client.ask(messages.region_read(0, 0x3000, 8))[1][16:] == struct.pack("<Q", 1 << 4), "pending"
    client.close()
    os.close(first)
    os.close(second)


def test_an_eventfd_without_room_holds_nobody_up(server: PlainServer) -> None:
    client = server.client()
    full = os.eventfd(0)  # a blocking one
    os.eventfd_write(full, (1 << 64) - 2)
    assert client.ask(set_irqs(EVENTFDS, 0, 1, fds=1), [full])[0] == 0
    assert client.ask(region_write(2, DOORBELL, bytes(8)))[0] == 0
    assert client.ask(get_info())[0] == 0
    client.close()
    os.close(full)


def test_what_is_no_eventfd_is_refused_and_closed(server: PlainServer) -> None:
    client = server.client()
    ram = memory(4096)
    assert client.ask(set_irqs(EVENTFDS, 0, 1, fds=1), [ram])[0] == EINVAL
    os.close(ram)
    client.close()


def test_a_client_that_does_not_read_holds_up_itself_alone(server: PlainServer) -> None:
    client = server.client()
    for _ in range(60):
        client.send(messages.region_read(2, 0, 64 << 10))
    answers = [client.answer() for _ in range(60)]
    assert {(errno, len(body)) for _, errno, body in answers} == {(0, 16 + (64 << 10))}
    client.close()


def test_a_second_client_is_turned_away_and_the_next_is_served(server: PlainServer) -> None:
    first = server.client()
    second = SocketClient(server.path)
    assert second.is_hung_up_on()
    second.close()
    assert first.ask(messages.get_info())[0] == 0
    first.close()
    server.client().close()


@pytest.mark.parametrize("cut", [1, 15, 16, 17])
def test_a_client_that_dies_in_the_middle_of_a_message_leaves_nothing(server: PlainServer, cut: int) -> None:
    client = server.client()
    ram = memory(4096)
    assert client.ask(dma_map(0, 4096), [ram])[0] == 0
    client.send(Sent(dma_map(4096, 4096).data[:cut], 1), [ram])
    os.close(ram)
    client.close()


@pytest.mark.parametrize(
    "breach",
    [b"\0" * 16, b"\xff" * 16, struct.pack("<HHIII", 1, 4, 15, 0, 0), struct.pack("<HHIII", 1, 4, 16, 1, 0)],
)
def test_a_damaged_header_ends_that_client_and_no_other(server: PlainServer, breach: bytes) -> None:
    client = server.client()
    client.send(Sent(breach))
    assert client.is_hung_up_on()
    client.close()
    server.client().close()


@pytest.mark.parametrize(
    "sent", [messages.device_reset(), get_info(), dma_map(0, 4096)], ids=["0", "16", "32"]
)
def test_more_fds_than_a_message_may_have_end_the_client_and_are_closed(
    server: PlainServer, sent: Sent
) -> None:
    client = server.client()
    fds = [memory(4096) for _ in range(20)]
    client.send(Sent(sent.data, 20), fds)
    for fd in fds:
        os.close(fd)
    assert client.is_hung_up_on()
    client.close()


def test_a_client_that_begins_with_anything_but_a_version_is_hung_up_on(server: PlainServer) -> None:
    server.client().close()
    server.nothing_is_left()
    client = SocketClient(server.path)
    client.send(messages.get_info())
    assert client.is_hung_up_on()
    client.close()


def test_mutated_orders_end_their_clients_at_most(server: PlainServer) -> None:
    random, kinds = Random(7), list(MUTATIONS)
    for _ in range(12):
        client = server.client()
        client.sock.setblocking(False)  # answers are not read: what has no room is not sent
        with suppress(OSError):
            for sent in [*qemu_boot()[1:], *BESIDE]:
                mutated = random.choice(kinds)(random, sent) if random.random() < 0.2 else sent
                send_with_files(client, mutated)
        client.close()
    server.client().close()


def test_a_mistake_of_ours_is_answered_eio_and_shows_in_the_exit_status(tmp_path: Path) -> None:
    server = PlainServer(tmp_path)
    client = server.client()
    assert client.ask(region_write(2, BUG, bytes(8)))[0] == EIO
    assert client.ask(messages.get_info())[0] == 0, "the client is served all the same"
    client.close()
    assert server.stop() == 1
