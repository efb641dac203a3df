"""Every scenario and workload that people can play on real daemons plays in one process as well."""

from __future__ import annotations

import pytest

from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS, SHARED
from simulator.world.system import play
from tests.integration.simulator.drawn import Drawn

LIBRARY = {**SCENARIOS, **{f"workload {name}": workload for name, workload in WORKLOADS.items()}}


@pytest.mark.parametrize("name", LIBRARY)
def test_it_plays_under_a_drawn_schedule(name: str) -> None:
    done = play(LIBRARY[name], SHARED, Drawn(2))
    assert done.problems == []
    assert not done.report.ended


@pytest.mark.parametrize("design", [name for name in DESIGNS if name != SHARED.name])
def test_it_plays_on_the_other_designs(design: str) -> None:
    done = play(WORKLOADS["late-attach"], DESIGNS[design], Drawn(2))
    assert done.problems == []
