"""The ghost beside the whole system in one interpreter: nothing is found in it, and what is planted is."""

from __future__ import annotations

import pytest

from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import MANAGED, MIRROR, NOTIFIER, SHARED, Design
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from simulator.planted.registry import planted
from simulator.world.system import play
from tests.integration.simulator.drawn import SMALL, Drawn


def watched(scenario: str, design: Design, seed: int) -> Ghost:
    ghost = Ghost(Verdicts())
    with watching(ghost) as watch:
        play(SCENARIOS[scenario], design, Drawn(seed), params=SMALL[scenario])
        watch.settled()
    return ghost


@pytest.mark.parametrize("design", [SHARED, MANAGED, MIRROR, NOTIFIER], ids=lambda design: design.name)
@pytest.mark.parametrize("scenario", SMALL)
def test_nothing_is_found_in_the_system_as_it_is(scenario: str, design: Design) -> None:
    ghost = watched(scenario, design, 1)
    assert ghost.verdicts.found == []
    assert ghost.heard.now > 100, "it was told too little to judge"
    assert ghost.groups.outstanding == []


@pytest.mark.parametrize(
    ("bug", "invariants"),
    [
        ("R4-acks-not-awaited", {"I6", "R17"}),
        ("cpus-are-not-flushed", {"I6", "R17"}),
        ("R7-no-device-tlb", {"I9"}),
        ("I9-not-waited-for", {"I9"}),
        ("I9-acked-and-not-flushed", {"I9"}),
    ],
)
def test_a_planted_bug_is_found(bug: str, invariants: set[str]) -> None:
    found: set[str] = set()
    with planted(bug):
        for seed in range(1, 4):
            found |= {violation.invariant for violation in watched("unmap", SHARED, seed).verdicts.found}
    assert found & invariants
