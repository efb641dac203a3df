"""What `unmap` makes of a device that does no work any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from protocol.hw.dsa import CompletionRecord, Status
from qemu_shim.scenarios.guest import DmaFailed
from qemu_shim.scenarios.series import unmap


class LostDevice:
    """Its DMA is blocked: no completion record is written any more."""

    def __init__(self) -> None:
        self.copies = 0

    async def memmove(self, *_: int) -> CompletionRecord:
        self.copies += 1
        assert self.copies < 100, "the rounds go on with a device that is lost"
        await trio.lowlevel.checkpoint()
        return CompletionRecord(status=Status.NONE)


async def test_a_device_that_is_lost_ends_the_rounds_that_wait_for_its_next_copy() -> None:
    guest: Any = SimpleNamespace(queue=LostDevice())
    slot: Any = SimpleNamespace(gpa=0)
    ctx: Any = SimpleNamespace(expect=lambda *_: None)
    story = unmap._Story(ctx, guest, slot, pages=1, expected=b"")
    with pytest.raises(DmaFailed, match="copy of page 0 with the slot in place: NONE"):
        await unmap._copy_all_the_time(story, 0, 1)
