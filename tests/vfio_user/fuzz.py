"""`python -m tests.vfio_user.fuzz --seed N --messages N`: orders of a client, mutated, against the oracle.

Each message goes to the server and to `tests/vfio_user/oracle.py`; answers byte for byte, hang-ups, memory,
interrupts and open fds must be the same after each.  A client that is hung up on must leave nothing, and the
next one begins anew.  What is found is told with its seed and the number of the message.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections import Counter
from collections.abc import Callable
from random import Random

from tests.kit.vfio_user import PlainFunction, ServedClient
from tests.vfio_user.messages import (
    Sent,
    get_region_info,
    message,
    qemu_boot,
    region_read,
    region_write,
    set_irqs,
    write_multi,
)
from tests.vfio_user.oracle import End, Oracle

EDGES = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    20,
    24,
    32,
    200,
    201,
    0xFFF,
    0x1000,
    0x1001,
    1 << 20,
    (1 << 20) + 33,
)
WIDE = (1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 0x1000, (1 << 64) - 1)

# What QEMU does not send in its order, or never.
BESIDE = (
    write_multi((0, 8, b"12345678"), (7, 4, b"ab")),
    set_irqs(1 | 8, 0, 1),
    region_write(3, 0x10, bytes(4)),
    region_read(3, 0x10, 4),
    get_region_info(2, 79),
    message(6, bytes(16)),
    message(14, bytes(8)),
)

Mutation = Callable[[Random, Sent], Sent]


def a_byte(random: Random, sent: Sent) -> Sent:
    data = bytearray(sent.data)
    data[random.randrange(len(data))] = random.choice(
        (0, 1, 2, 0x10, 0x7F, 0x80, 0xFF, random.randrange(256))
    )
    return Sent(bytes(data), sent.fds)


def a_word(random: Random, sent: Sent) -> Sent:
    """An aligned field of the body becomes a number at some edge, or near what it was."""
    body = bytearray(sent.data[16:])
    size = random.choice((4, 8))
    if len(body) < size:
        return sent
    at = random.randrange(len(body) // 4 - size // 4 + 1) * 4
    before = int.from_bytes(body[at : at + size], "little")
    value = random.choice((*EDGES, *WIDE, before + 1, before - 1, before ^ 0x1000, before * 2))
    body[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return Sent(sent.data[:16] + bytes(body), sent.fds)


def _resized(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", len(data)) + data[8:]


def shorter(random: Random, sent: Sent) -> Sent:
    return Sent(_resized(sent.data[: random.randrange(16, len(sent.data) + 1)]), sent.fds)


def longer(random: Random, sent: Sent) -> Sent:
    return Sent(_resized(sent.data + random.randbytes(random.choice((1, 4, 8, 24)))), sent.fds)


def a_size(random: Random, sent: Sent) -> Sent:
    """The header lies about how long the message is."""
    size = random.choice((*EDGES, len(sent.data) - 1, len(sent.data) + 1))
    return Sent(sent.data[:4] + struct.pack("<I", size) + sent.data[8:], sent.fds)


def a_command(random: Random, sent: Sent) -> Sent:
    return Sent(
        sent.data[:2] + struct.pack("<H", random.choice((*range(21), 0xFFFF))) + sent.data[4:], sent.fds
    )


def posted(random: Random, sent: Sent) -> Sent:
    flags = random.choice((0x10, 0x10, 0x10, 0, 1, 0x20, 0x100))
    return Sent(sent.data[:8] + struct.pack("<I", flags) + sent.data[12:], sent.fds)


def some_fds(random: Random, sent: Sent) -> Sent:
    return Sent(sent.data, random.choice((0, 1, 2, 3, 4, 5, 16, 17)))


MUTATIONS: dict[Mutation, int] = {
    a_byte: 2,
    a_word: 6,
    shorter: 1,
    longer: 1,
    a_size: 1,
    a_command: 2,
    posted: 1,
    some_fds: 2,
}


class Fuzzer:
    """`step` sends one message more.  AssertionError: the server is not what the oracle says."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.sent = 0
        self.seen: Counter[str] = Counter()
        self._corpus = [*qemu_boot(), *BESIDE]
        self._order: list[Sent] = []
        self._next_fd = 100
        self._connect()

    def _connect(self) -> None:
        self.function = PlainFunction()
        self.served, self.oracle = ServedClient(self.function), Oracle()
        self._at = 0
        self._wild = self.random.choice((0.02, 0.2, 0.8))  # how many messages of this client are mutated
        self._order = list(self._corpus)
        if self.random.random() < 0.05:
            self.random.shuffle(self._order)

    def _pick(self) -> Sent:
        """Most follow the order, so that there is a state to break; some come out of turn."""
        if self._at and self.random.random() < 0.3:
            return self.random.choice(self._corpus)
        self._at += 1
        return self._order[(self._at - 1) % len(self._order)]

    def step(self) -> None:
        sent = self._pick()
        if self.random.random() < (self._wild if self.oracle.greeted else 0.05):
            kind = self.random.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
            sent = kind(self.random, sent)
        self.send(sent)
        self.sent += 1

    def send(self, sent: Sent) -> None:
        fds = list(range(self._next_fd, self._next_fd + sent.fds))
        self._next_fd += sent.fds
        self._in_pieces(sent.data, fds)

    def _in_pieces(self, data: bytes, fds: list[int]) -> None:
        """A stream has no messages: now and then one comes in two halves."""
        cut = self.random.randrange(1, len(data)) if self.random.random() < 0.1 else len(data)
        for part, with_it in ((data[:cut], fds), (data[cut:], [])):
            if part and not self._receive(part, with_it):
                return

    def _receive(self, data: bytes, fds: list[int]) -> bool:
        """Is the client still served?"""
        try:
            expected, ends = self.oracle.receive(data, fds), False
        except End as end:
            expected, ends = end.args[0], True
        answers = [tuple(answer) for answer in self.served.receive(data, fds)]
        assert answers == expected, f"{data[:64]!r} with {fds} is answered {answers}, not {expected}"
        assert (self.served.ended is not None) == ends, f"hung up: {self.served.ended}, expected: {ends}"
        self.seen["hung up" if ends else "answered"] += 1 if ends else len(answers)
        for answer, _ in answers:
            self.seen[f"errno {int.from_bytes(answer[12:16], 'little')}"] += 1
        if ends:
            assert not self.served.ledger.open, f"left open: {self.served.ledger.open}"
            assert not self.function.windows
            assert not any(self.function.events)
            self._connect()
            return False
        self._compare()
        return True

    def _compare(self) -> None:
        function, oracle = self.function, self.oracle
        assert self.served.ledger.open == oracle.open_fds(), "fds are open that nobody holds, or were closed"
        held = {(window.start, window.size, window.fd) for window in function.windows}
        assert held == set(oracle.windows)
        assert [getattr(event, "fd", None) for event in function.events] == oracle.events
        assert (function.triggered, function.resets) == (oracle.triggered, oracle.resets)
        assert function.memory == oracle.memory


def run(seed: int, messages: int) -> Fuzzer:
    fuzzer = Fuzzer(seed)
    try:
        while fuzzer.sent < messages:
            fuzzer.step()
    except Exception as error:
        error.add_note(f"--seed {seed} --messages {fuzzer.sent + 1}: the last message")
        raise
    return fuzzer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--messages", type=int, default=20_000)
    given = options.parse_args()
    began = time.monotonic()
    fuzzer = run(given.seed, given.messages)
    took = time.monotonic() - began
    print(f"{fuzzer.sent} messages, seed {given.seed}, {took:.1f} s: nothing found")
    for what, count in sorted(fuzzer.seen.items()):
        print(f"  {what}: {count}")


if __name__ == "__main__":
    main()
