"""A DSA's endpoint with plain memory behind its BARs, and a client of it that reads and writes."""

from __future__ import annotations

import struct

from tests.kit.vfio_user import ServedClient
from tests.vfio_user import messages
from tests.vfio_user.messages import Sent
from vfio_user.core.function import DmaWindow
from vfio_user.core.pci.dsa import BAR0_BYTES, BAR2_BYTES, dsa_endpoint

CONFIG = 7


class PlainSilicon:
    """The port `PciSilicon`."""

    def __init__(self) -> None:
        self.bars = {0: bytearray(BAR0_BYTES), 2: bytearray(BAR2_BYTES)}
        self.windows: set[DmaWindow] = set()
        self.resets = 0

    async def read(self, bar: int, offset: int, count: int) -> bytes:
        return bytes(self.bars[bar][offset : offset + count])

    async def write(self, bar: int, offset: int, data: bytes) -> None:
        self.bars[bar][offset : offset + len(data)] = data

    async def reset(self) -> None:
        self.resets += 1

    async def map(self, window: DmaWindow) -> None:
        self.windows.add(window)

    async def unmap(self, window: DmaWindow) -> None:
        self.windows.remove(window)


class DsaClient(ServedClient):
    """Has said its version."""

    def __init__(self) -> None:
        self.silicon = PlainSilicon()
        self.endpoint = dsa_endpoint(self.silicon)
        super().__init__(self.endpoint)
        assert self.errno(messages.version()) == 0

    def ask(self, sent: Sent, *fds: int) -> tuple[int, bytes]:
        """errno and body of the answer."""
        (answer,) = self.receive(sent.data, fds)
        return struct.unpack_from("<I", answer.data, 12)[0], answer.data[16:]

    def errno(self, sent: Sent, *fds: int) -> int:
        return self.ask(sent, *fds)[0]

    def load(self, region: int, offset: int, count: int) -> int:
        errno, body = self.ask(messages.region_read(region, offset, count))
        assert errno == 0
        return int.from_bytes(body[16:], "little")

    def put(self, region: int, offset: int, data: bytes) -> None:
        assert self.errno(messages.region_write(region, offset, data)) == 0
