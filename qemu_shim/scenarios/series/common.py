"""What several of these scenarios say: a pattern, the page it fills, and how a device's work ended."""

from __future__ import annotations

from collections.abc import Awaitable

from protocol.hw.dsa import Status
from qemu_shim.api import PAGE_SIZE, DmaFailed

PATTERN = 0x1122_3344_5566_7788
FILLED = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)


async def status_of(work: Awaitable[object]) -> Status:
    """Of a fill or copy of a device's, whichever it is."""
    try:
        await work
    except DmaFailed as failed:
        return failed.record.status
    return Status.SUCCESS
