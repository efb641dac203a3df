"""What a recorder makes of the daemons' counters."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from qemu_shim.scenarios import recorder
from qemu_shim.scenarios.measure import Snapshot
from qemu_shim.vmm.machine import Host


async def test_a_look_leaves_the_snapshot_as_the_daemons_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def snapshot(host: Host) -> Snapshot:
        return Snapshot(Counter({"kvmd.frames": 7}), {})

    monkeypatch.setattr(recorder, "snapshot", snapshot)
    one = recorder.Recorder(cast(Host, None), alone=True)
    one.elsewhere = 2
    assert (await one.look())["kvmd.frames"] == 5
    assert one.last.raw == {"kvmd.frames": 7}


async def test_who_waits_long_asks_less_often(autojump_clock: MockClock) -> None:
    asked: list[float] = []

    async def never() -> bool:
        asked.append(trio.current_time())
        return False

    with pytest.raises(recorder.NeverQuiet, match="not quiet after 30 s: rest"):
        await recorder.until("rest", never)
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert gaps[0] == pytest.approx(recorder.QUIET_POLL_S)
    assert len(asked) < 200
    assert max(gaps) < recorder.PATIENCE_S / 10
