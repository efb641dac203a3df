"""A client's messages as QEMU 11 sends them, from literal layouts that are not the server's, and their order.

The order is what was seen of QEMU 11.1 booting a Linux guest: VERSION, memory, what the function is, all of
config space at once, interrupts, reset, the BIOS's shadowing as bursts of DMA_UNMAP and DMA_MAP that nobody
waits for, then the driver.
"""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

POSTED = 0x10
EVENTFDS = 4 | 32  # DATA_EVENTFD, ACTION_TRIGGER
NONE = 1 | 32
BOOLS = 2 | 32
MSIX = 2
CONFIG = 7

CAPABILITIES = {
    "capabilities": {
        "migration": {"pgsize": 4096, "max_bitmap_size": 256 << 20},
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "pgsizes": 4096,
        "max_dma_maps": 65535,
        "write_multiple": True,
    }
}


class Sent(NamedTuple):
    """One sendmsg: bytes, and how many fds with their first."""

    data: bytes
    fds: int = 0


def message(number: int, body: bytes, *, message_id: int = 1, flags: int = 0, fds: int = 0) -> Sent:
    return Sent(struct.pack("<HHIII", message_id, number, 16 + len(body), flags, 0) + body, fds)


def version(text: str | None = None) -> Sent:
    data = json.dumps(CAPABILITIES) if text is None else text
    return message(1, struct.pack("<HH", 0, 0) + data.encode() + b"\0")


def dma_map(start: int, size: int, *, offset: int = 0, flags: int = 3, fds: int = 1) -> Sent:
    return message(2, struct.pack("<IIQQQ", 32, flags, offset, start, size), fds=fds)


def dma_unmap(start: int, size: int, *, flags: int = 0) -> Sent:
    return message(3, struct.pack("<IIQQ", 24, flags, start, size))


def get_info() -> Sent:
    return message(4, struct.pack("<IIII", 16, 0, 0, 0))


def get_region_info(index: int, argsz: int = 32) -> Sent:
    return message(5, struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0))


def get_irq_info(index: int) -> Sent:
    return message(7, struct.pack("<IIII", 16, 0, index, 0))


def set_irqs(
    flags: int, start: int, count: int, *, data: bytes = b"", fds: int = 0, index: int = MSIX
) -> Sent:
    body = struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data
    return message(8, body, fds=fds)


def region_read(region: int, offset: int, count: int) -> Sent:
    return message(9, struct.pack("<QII", offset, region, count))


def region_write(region: int, offset: int, data: bytes, *, flags: int = 0) -> Sent:
    return message(10, struct.pack("<QII", offset, region, len(data)) + data, flags=flags)


def write_multi(*writes: tuple[int, int, bytes]) -> Sent:
    """Of (region, offset, data)."""
    rows = [struct.pack("<QII8s", offset, region, len(data), data) for region, offset, data in writes]
    return message(15, struct.pack("<Q", len(writes)) + b"".join(rows), flags=POSTED)


def device_reset() -> Sent:
    return message(13, b"")


def qemu_boot() -> list[Sent]:
    """From connecting to the driver's first registers."""
    low, high, rom = 0x8000_0000, 0x8000_0000, 0xFFFC_0000
    shadowed = [(0xC0000 + 0x4000 * n, 0x4000) for n in range(12)]
    order = [
        version(),
        dma_map(0, 0xA0000),
        dma_map(0xC0000, 0x30000, offset=0xC0000, flags=1),
        dma_map(0x10_0000, low - 0x10_0000, offset=0x10_0000),
        dma_map(1 << 32, high, offset=low),
        dma_map(rom, 0x40000, flags=1, fds=0),
        get_info(),
        *(get_region_info(index) for index in (0, 1, 2, 3, 4, 5, 7)),
        get_region_info(2, 96),
        *(get_irq_info(index) for index in range(5)),
        region_read(CONFIG, 0, 4096),
        set_irqs(NONE, 0, 0),
        device_reset(),
        dma_unmap(0xC0000, 0x30000),
        *(dma_map(start, size, offset=start, flags=1 + 2 * (start & 0x4000 > 0)) for start, size in shadowed),
        *(dma_unmap(start, size) for start, size in shadowed),
        dma_map(0xC0000, 0x30000, offset=0xC0000),
        *(region_read(CONFIG, offset, 4) for offset in (0, 4, 0x10, 0x3C)),
        region_write(CONFIG, 4, b"\x06\x04"),
        set_irqs(EVENTFDS, 0, 1, fds=1),
        set_irqs(EVENTFDS, 1, 3, fds=3),
        set_irqs(EVENTFDS, 2, 2),
    ]
    driver = [
        region_read(0, 0x10, 8),
        region_write(0, 0x80, bytes(4), flags=POSTED),
        region_write(2, 0x400, bytes(range(8)), flags=POSTED),
        region_read(0, 0xA8, 4),
        set_irqs(BOOLS, 0, 4, data=b"\1\0\1\0"),
        set_irqs(NONE, 0, 1),
    ]
    return [*order, *driver * 3, set_irqs(NONE, 0, 0), dma_unmap(0, 0, flags=2)]
