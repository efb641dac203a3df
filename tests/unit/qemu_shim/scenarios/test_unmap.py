"""What `unmap` makes of a device that does no work any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from protocol.hw.dsa import CompletionRecord, Status
from qemu_shim.scenarios.guest import DmaFailed
from qemu_shim.scenarios.series import unmap
from tests.patience import PATIENCE_S


class LostDevice:
    """Its DMA is blocked: no completion record is written any more."""

    async def memmove(self, *_: int) -> CompletionRecord:
        await trio.lowlevel.checkpoint()
        return CompletionRecord(status=Status.NONE)


async def test_a_device_that_is_lost_ends_the_rounds_that_wait_for_its_next_copy() -> None:
    guest: Any = SimpleNamespace(queue=LostDevice())
    slot: Any = SimpleNamespace(gpa=0)
    ctx: Any = SimpleNamespace(expect=lambda *_: None)
    story = unmap._Story(ctx, guest, slot, pages=1, expected=b"")
    with (
        trio.fail_after(PATIENCE_S),
        pytest.raises(DmaFailed, match="copy of page 0 with the slot in place: NONE"),
    ):
        await unmap._copy_all_the_time(story, 0, 1)
