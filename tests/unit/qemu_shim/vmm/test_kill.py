"""A daemon that a scenario kills: only one that was started for it, and by a name that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from qemu_shim.vmm.machine import Host
from qemu_shim.vmm.supervisor import Supervisor


def host_of(killer: Any) -> Host:
    nothing = cast(Any, None)
    host = Host(nothing, nothing, nothing, nothing)
    host.killer = killer
    return host


async def test_daemons_that_ran_before_are_not_ours_to_kill() -> None:
    host = host_of(None)
    with pytest.raises(LookupError, match="iommufdd was not started for this run"):
        await host.kill("iommufdd")
    assert host.killed == set()


async def test_a_daemon_of_no_such_name_is_refused(tmp_path: Path) -> None:
    host = host_of(Supervisor(tmp_path, tmp_path, {}, "info").kill)
    with pytest.raises(LookupError, match="no gpud runs"):
        await host.kill("gpud")
    assert host.killed == set()
