"""A trio run on virtual time."""

from __future__ import annotations

from random import Random

import trio

from simulator.kernel.process import SimProcess
from simulator.search.replay import Replay
from simulator.world.journal import Journal
from simulator.world.limits import LIMIT_NS
from simulator.world.process import run
from simulator.world.scheduler import World
from tests.unit.simulator.world.toys import finish


def two_sleepers(start_ns: int) -> list[str]:
    """What happens when a deadline of the second is over with the first step of the first."""
    journal = Journal(keep=True)
    world = World(Replay(()), journal)
    process = SimProcess(world.host, "a")

    async def sleeper() -> None:
        for _ in range(3):
            world.point("works")
            await trio.sleep(0.001)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            nursery.start_soon(sleeper)

    def life() -> None:
        world.wait((), start_ns / 1e9)
        run(world, process, main)

    world.spawn(process, life)
    finish(world)
    assert journal.lines is not None
    return journal.lines


def test_what_is_over_at_one_moment_does_not_depend_on_how_far_time_has_come() -> None:
    expected, random = two_sleepers(1_000), Random(1)
    for _ in range(300):
        start_ns = random.randrange(1, LIMIT_NS // random.choice((2, 10**3, 10**6)))
        assert two_sleepers(start_ns) == expected, start_ns
