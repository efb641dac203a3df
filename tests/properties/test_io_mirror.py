"""Any schedule of faults, notes, invalidations, maps and pins keeps iommufdd's mirror right; a planted bug
breaks it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from protocol.hw.qi import ResponseCode
from tests.planted.plugin import Plants
from tests.properties.io_mirror_machine import MirrorMachine

STEPS = 200
WEIGHTS: dict[Callable[[MirrorMachine], None], int] = {
    MirrorMachine.arrive: 40,
    MirrorMachine.device_reads: 20,
    MirrorMachine.fault: 14,
    MirrorMachine.cpu_touches: 8,
    MirrorMachine.host_gives_up: 8,
    MirrorMachine.host_collapses: 4,
    MirrorMachine.pin: 4,
    MirrorMachine.unpin: 3,
    MirrorMachine.remap: 1,
}


def play(seed: int) -> MirrorMachine:
    machine, random = MirrorMachine(seed), Random(seed)
    for step in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        step(machine)
        machine.check()
    machine.end()
    return machine


def play_all(seeds: int) -> None:
    for seed in range(seeds):
        play(seed)


@pytest.mark.parametrize("seed", range(20))
def test_no_schedule_breaks_the_mirror(seed: int) -> None:
    machine = play(seed)
    for wait in machine.running:
        wait.result()  # it came to its end, and without a bug
    assert machine.flows.waiting == 0
    assert (machine.counts.notes_pending, machine.counts.pinned_pages) == (0, 0)
    assert machine.hwpt.acked == machine.hwpt.iotlb_syncs
    assert not machine.codes[ResponseCode.FAILURE]


def test_the_schedules_reach_what_they_are_about() -> None:
    counts = [play(seed).counts for seed in range(8)]
    for name in ("io_fault_retries", "io_faults_spurious", "notes_mapped", "splits"):
        assert sum(getattr(one, name) for one in counts), name


BUGS = (
    "R1-lookup-never-stale",
    "R4-mirror-acks-unflushed",
    "R4-flush-of-another-not-awaited",
    "R4-units-are-not-asked",
    "pinned-over-a-pin",
    "unpinned-and-mapped",
    "unpinned-before-the-flush",
)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(plant: Plants, bug: str) -> None:
    plant(bug)
    with pytest.raises(AssertionError, match=r"I6|R1|I28"):
        play_all(60)
