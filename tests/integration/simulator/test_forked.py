"""Schedules in forks of one machine, held to the same schedules from nothing; and what becomes of forks."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from qemu_shim.api import PAGE_SIZE, Context
from qemu_shim.vmm.interrupt import SIGNALS
from simulator.command import find
from simulator.search.excerpt import Excerpt
from simulator.search.exhaustive import Exhaustive
from simulator.search.explore import OTHER, PlayerLost, explore
from simulator.search.replay import Recorded, Replay
from simulator.search.walk import RandomWalk
from simulator.settle import settle
from simulator.stories.story import Play, SmallStory
from simulator.world.forked import Forked
from simulator.world.schedule import Judged

HERE = os.getpid()


def judged(play: Play) -> Judged:
    return Judged(lambda _: SmallStory("told", "", play), "told", "shared")


async def copied(ctx: Context, excerpt: Excerpt) -> None:
    """A device copies what a vCPU stores."""
    guest = await ctx.boot_for(4)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.copy, PAGE_SIZE, 0)
                await guest.write(0, b"store")
        await guest.read(0, 8)


def children() -> set[int]:
    """Of this process, zombies included [proc(5) stat]."""
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", process, "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat.rpartition(")")[2].split()[1]) == HERE:
            found.add(int(process))
    return found


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Others' daemons may be children of the process that runs the tests."""
    before = children()
    yield
    assert children() <= before


def test_a_child_that_nobody_waited_for_would_be_seen() -> None:
    before = children()
    child = os.fork()
    if not child:
        os._exit(0)
    assert children() - before == {child}
    os.waitpid(child, 0)


def test_a_fork_plays_what_is_played_from_nothing() -> None:
    forked, walk = Forked(judged(copied)), Recorded(RandomWalk(3), steps=True)
    played = []
    for _ in range(6):
        assert not forked(walk).invariant
        played.append((walk.answers, walk.steps))
        walk.ended(False)
    forked.renew()
    assert len({answers for answers, _ in played}) == 6
    for answers, steps in played[-2:]:
        again = Recorded(Replay(answers), steps=True)
        assert not judged(copied)()(again).invariant
        assert again.steps == steps


def test_a_search_in_forks_knows_what_a_search_from_nothing_knows() -> None:
    forks, nothing = Exhaustive(), Exhaustive()
    one = explore(Forked(judged(copied)), forks, 0, 5)
    other = explore(judged(copied)(), nothing, 0, 5)
    assert one.traces == other.traces
    assert forks.summary() == nothing.summary()


def test_what_breaks_in_a_fork_is_found_with_its_answers() -> None:
    """And they break the same from nothing."""
    planted = Judged(find, "discard", "shared", plant="R4-acks-not-awaited")
    (found,) = explore(Forked(planted), RandomWalk(1), 1, 60, lambda tally: bool(tally.found)).found
    assert planted()(Replay(found.answers)).invariant == found.result.invariant != ""


def test_a_story_that_raises_in_a_fork_is_a_failure_of_its_schedule() -> None:
    async def raises(ctx: Context, excerpt: Excerpt) -> None:
        for _ in excerpt.rounds():
            with excerpt:
                await trio.lowlevel.checkpoint()
            assert os.getpid() == HERE, "in a fork"

    forked = Forked(judged(raises))
    end = forked(Recorded(RandomWalk(1)))
    forked.renew()
    assert end.invariant == OTHER
    assert "in a fork" in end.sentence


def test_a_fork_is_judged_by_its_machines_end() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        for _ in excerpt.rounds():
            with excerpt:
                await trio.lowlevel.checkpoint()
        ctx.expect(os.getpid() == HERE, "I0: at the end")

    forked = Forked(judged(play))
    end = forked(Recorded(RandomWalk(1)))
    forked.renew()
    assert end.invariant == "I0"


def test_what_was_settled_stays_so() -> None:
    """What is imported is not looked at behind each machine again."""
    settle()
    before = gc.get_freeze_count()
    forked = Forked(judged(copied))
    forked(RandomWalk(1))
    forked.renew()
    assert gc.get_freeze_count() >= before > 0


def in_the_fork(do: Callable[[], None]) -> Play:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        for _ in excerpt.rounds():
            excerpt.open()
            if os.getpid() != HERE:
                do()
            excerpt.close()

    return play


def test_a_fork_that_is_killed_is_nobodys_schedule() -> None:
    forked = Forked(judged(in_the_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))))
    with pytest.raises(PlayerLost, match="ended with -9"):
        forked(RandomWalk(1))
    forked.renew()


@pytest.mark.parametrize("number", SIGNALS)
def test_who_is_interrupted_leaves_no_fork_behind(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)  # workers of a test run ignore one
    forked = Forked(judged(in_the_fork(lambda: os.kill(HERE, number))))
    try:
        with pytest.raises(KeyboardInterrupt):
            forked(RandomWalk(1))
    finally:
        signal.signal(number, before)
    forked.renew()
