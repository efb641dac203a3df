"""Daemons that die, or stand still, at some step of theirs: who is left serves on, and who comes back."""

from __future__ import annotations

from contextlib import suppress

import pytest

from protocol.errors import PeerError, UapiError
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import Host
from simulator.world.fate import Fate
from simulator.world.system import System, system
from tests.integration.simulator.drawn import SMALL, Drawn


def played(made: System, name: str) -> Report:
    """A VMM plays it; what it says when daemons die under it is in its report."""
    report = Report(name)

    async def work(host: Host) -> None:
        await run_scenario(host, SCENARIOS[name], SHARED, 1, SMALL[name], report)

    with suppress(PeerError):
        made.world.run(made.client(work))
    return report


def settled(made: System) -> None:
    """VMMs may fail of what they were denied, daemons may not."""
    told = [error for error in made.world.crashes() if not isinstance(error, PeerError | UapiError | OSError)]
    assert told == []
    assert made.crashes == []


@pytest.mark.parametrize("victim", ["kvmd", "iommufdd", "device_sim"])
@pytest.mark.parametrize("step", [100, 200, 400])
def test_a_daemon_dies_and_comes_back(victim: str, step: int) -> None:
    """The survivors' own checks hold, and the next VMM is served."""
    with system(Drawn(step), fates={victim: Fate(step)}) as made:
        played(made, "unmap")
        assert made.restart() == [victim]
        after = played(made, "sharing")
        made.stop()
        settled(made)
    assert after.problems == []


@pytest.mark.parametrize("victim", ["kvmd", "iommufdd", "device_sim"])
def test_a_daemon_that_stands_still_for_a_while_is_waited_for(victim: str) -> None:
    with system(Drawn(3), fates={victim: Fate(400, stops_s=0.4)}) as made:
        assert played(made, "unmap").problems == []
        made.stop()
        settled(made)
        assert made.world.now_ns() > 400_000_000
