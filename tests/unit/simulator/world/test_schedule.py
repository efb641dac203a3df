"""What a schedule is judged by beside the ghost: where nobody can go on, why that is."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from greenlet import greenlet

from qemu_shim.api import Context
from simulator.faults.plan import Faults
from simulator.faults.store_buffer import StoreBuffer
from simulator.kernel.process import SimHost, SimProcess
from simulator.search.excerpt import Excerpt
from simulator.search.explore import STUCK
from simulator.search.walk import RandomWalk
from simulator.stories.story import SmallStory
from simulator.world import schedule
from simulator.world.limits import Stuck
from simulator.world.schedule import Judged
from simulator.world.scheduler import World
from simulator.world.thread import SimThread

MISSED = "device_sim looked at unit 0[4] before iommufdd's store to it was there"


async def nothing(ctx: Context, excerpt: Excerpt) -> None: ...


@pytest.mark.parametrize(("missed", "invariant"), [(MISSED, "R15"), ("", STUCK)])
def test_who_is_stuck_behind_a_store_that_was_seen_too_late_is_a_case_of_r15(
    missed: str, invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gets_stuck(*given: Any) -> Generator[list[str]]:
        (faults,) = [each for each in given if isinstance(each, Faults)]
        faults.buffer = StoreBuffer("iommufdd")
        faults.buffer.missed = missed
        yield from ()
        raise Stuck("nobody can go on")

    monkeypatch.setattr(schedule, "playing_faulted", gets_stuck)
    judged = Judged(lambda _: SmallStory("told", "", nothing), "told", "shared", faults=("store-buffer",))
    end = judged(1)(RandomWalk(0))
    assert end.invariant == invariant
    assert missed in end.sentence


def test_who_is_stuck_behind_a_death_met_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def gets_stuck(*given: Any) -> Generator[list[str]]:
        (faults,) = [each for each in given if isinstance(each, Faults)]
        host = SimHost(World(RandomWalk(0)))
        thread = SimThread(SimProcess(host, "kvmd"), "kvmd", greenlet(), None)  # it came to its fate
        faults._sealed.append(("sigkill", thread))
        yield from ()
        raise Stuck("nobody can go on")

    monkeypatch.setattr(schedule, "playing_faulted", gets_stuck)
    judged = Judged(lambda _: SmallStory("told", "", nothing), "told", "shared", faults=("sigkill",))
    assert judged(1)(RandomWalk(0)).faulted
