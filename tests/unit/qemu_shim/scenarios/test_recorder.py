"""What a recorder makes of the daemons' counters."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest

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
