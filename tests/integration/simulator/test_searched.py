"""The exhaustive search on the real daemons: one DMA beside one host change, one page, one device.

What it rests on: that the world tells all that a step touches.  The search itself refuses a step that another
one enabled without a touch in common (`HiddenDependenceError`); here it finds none, and finds one put in.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from qemu_shim.api import MIB, PAGE_SIZE, Context, Scenario
from qemu_shim.vmm.designs import DESIGNS
from simulator.search.excerpt import Excerpt
from simulator.search.exhaustive import Exhaustive, HiddenDependenceError
from simulator.search.option import Option, Touch
from simulator.search.replay import Recorded
from simulator.world.limits import Stopped
from simulator.world.scheduler import World
from simulator.world.system import play

GPA = 0x1_8000_0000
RUNS = 6
SMALL = ("mirror", "notifier", "managed", "shared")  # pinned: a page that is given up costs a thousand steps


def story(excerpt: Excerpt) -> Scenario:
    async def play_it(ctx: Context) -> None:
        guest = await ctx.boot()
        await guest.add_slot(MIB, GPA)
        await guest.write(GPA, bytes(PAGE_SIZE))
        excerpt.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.queue.memmove, GPA + PAGE_SIZE, GPA, PAGE_SIZE)
            await guest.discard(GPA)
        excerpt.close()

    return Scenario(name="smallest", summary="", play=play_it)


def searched(design: str, runs: int) -> Iterator[Recorded]:
    """Each run that was not pruned."""
    search = Recorded(Exhaustive())
    excerpt = Excerpt(search)
    for _ in range(runs):
        try:
            assert play(story(excerpt), DESIGNS[design], excerpt).problems == []
            yield search
        except Stopped:
            pass
        assert excerpt.ended(False), "it has come to an end"


@pytest.mark.parametrize("design", SMALL)
def test_a_search_finds_other_traces_and_no_hidden_dependence(design: str) -> None:
    traces = [run.trace for run in searched(design, RUNS)]
    assert len(traces) >= 2
    assert len(set(traces)) == len(traces)


def test_a_world_that_keeps_a_touch_to_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's own steps no longer touch what a delivery to it changed."""
    told = World._tell_taken

    def forgets(world: World) -> None:
        if world._taken is not None and "<" not in world._taken.actor:
            kept = frozenset[Touch]()
            world._taken = Option(world._taken.actor, world._taken.label, kept)
        told(world)

    monkeypatch.setattr(World, "_tell_taken", forgets)
    with pytest.raises(HiddenDependenceError):
        list(searched("shared", RUNS))
