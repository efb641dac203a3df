"""A vfio-user server without a socket: a function of plain memory, fds that are counted, a stream.

`ServedClient` gives the server what a stream socket would: at most what it asks for.  fds are numbers; those
that FIVE divides are no eventfds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from errno import EINVAL, ENOMEM

from protocol.errors import PeerError, UapiError
from tests.kit.by_hand import ByHand
from vfio_user.core.function import DmaWindow, IrqEvent, PciFunction, PciRegion, RegionFile
from vfio_user.core.session import ClientSession, MessageAnswer
from vfio_user.core.stream import MessageStream

FIVE = 5
FILE_FD = 3  # the function's own, of what BAR 2 may be mapped from
AREAS = ((0, 0x1000), (0x1000, 0x800))
SIZES = {0: 0x1000, 2: 0x2000, 3: 0x100, 7: 4096}  # of the regions there are
READ_ONLY = 3
VECTORS = 4
TOO_LARGE = 1 << 40  # of a window: the function refuses it


class Ledger:
    """The port `ClientFds`: every fd that came is closed once."""

    def __init__(self) -> None:
        self.open: set[int] = set()

    def close(self, fd: int) -> None:
        assert fd in self.open, f"fd {fd} is closed twice"
        self.open.remove(fd)

    def event_of(self, fd: int) -> IrqEvent:
        assert fd in self.open, f"fd {fd} is not open"
        if fd % FIVE == 0:
            raise UapiError(EINVAL, f"fd {fd} is no eventfd")
        return CountedEvent(self, fd)


class CountedEvent:
    def __init__(self, ledger: Ledger, fd: int) -> None:
        self._ledger = ledger
        self.fd = fd
        self.signals = 0

    def signal(self) -> None:
        assert self.fd in self._ledger.open, f"fd {self.fd} is signalled after it was closed"
        self.signals += 1

    def close(self) -> None:
        self._ledger.close(self.fd)


class PlainFunction:
    """The port `PciFunction`; asserts that it is asked for nothing it does not have."""

    def __init__(self) -> None:
        self.memory = {index: bytearray(size) for index, size in SIZES.items()}
        self.regions = [self._region(index) for index in range(9)]
        self.irqs = [0, 0, VECTORS, 0, 0]
        self.windows: set[DmaWindow] = set()
        self.events: list[IrqEvent | None] = [None] * VECTORS
        self.triggered = [0] * VECTORS
        self.resets = 0

    def _region(self, index: int) -> PciRegion:
        file = RegionFile(FILE_FD, 0x4000, AREAS) if index == 2 else None
        return PciRegion(SIZES.get(index, 0), index != READ_ONLY, file)

    async def read(self, index: int, offset: int, count: int) -> bytes:
        assert 0 <= offset < offset + count <= SIZES[index]
        return bytes(self.memory[index][offset : offset + count])

    async def write(self, index: int, offset: int, data: bytes) -> None:
        assert 0 <= offset < offset + len(data) <= SIZES[index]
        assert index != READ_ONLY
        self.memory[index][offset : offset + len(data)] = data

    async def reset(self) -> None:
        self.resets += 1

    async def map(self, window: DmaWindow) -> None:
        if window.size >= TOO_LARGE:
            raise UapiError(ENOMEM, "too large")
        assert not any(window.start < other.end and other.start < window.end for other in self.windows)
        self.windows.add(window)

    async def unmap(self, window: DmaWindow) -> None:
        self.windows.remove(window)

    def set_irqs(self, index: int, start: int, events: Sequence[IrqEvent | None]) -> None:
        assert start + len(events) <= self.irqs[index]
        if events:
            self.events[start : start + len(events)] = events

    def trigger(self, index: int, number: int) -> None:
        assert index == 2
        self.triggered[number] += 1


class ServedClient(ByHand):
    """One client of a server."""

    def __init__(self, function: PciFunction) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.refusals: list[UapiError] = []
        self.stream = MessageStream(self.ledger.close)
        self.session = ClientSession(function, self.ledger, self.refusals.append)
        self.ended: PeerError | None = None

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> list[MessageAnswer]:
        """One segment of the stream, with fds at its first byte; what is answered to it."""
        segments = deque([(data, tuple(fds))])
        self.ledger.open |= set(fds)
        answers = []
        while segments and self.ended is None:
            rest, with_it = segments.popleft()
            part, rest = rest[: self.stream.wanted], rest[self.stream.wanted :]
            if rest:
                segments.append((rest, ()))
            try:
                message = self.stream.feed(part, with_it)
                answer = self.run(self.session.handle(message)) if message else None
            except PeerError as error:
                self.ended = error
                self.close()
                break
            answers += [answer] if answer else []
        return answers

    def close(self) -> None:
        """The client has gone; whoever reads does not keep what it has read."""
        self.stream.close()
        self.run(self.session.close())
