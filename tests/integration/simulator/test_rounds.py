"""Schedules one after the other in one machine, each judged."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import trio

from qemu_shim.api import PAGE_SIZE, Context
from simulator.command import find
from simulator.faults.kinds import ALL
from simulator.ghost.probes.watch import Watch
from simulator.search.excerpt import Excerpt
from simulator.search.exhaustive import Exhaustive
from simulator.search.explore import OTHER, explore, smallest
from simulator.search.option import STOP, Option
from simulator.search.replay import Answers, Recorded, Replay
from simulator.search.walk import RandomWalk
from simulator.stories.library import STORIES
from simulator.stories.story import Play, SmallStory
from simulator.world.forked import Forked
from simulator.world.journal import Journal
from simulator.world.schedule import Judged, Living
from simulator.world.scheduler import World

ROUNDS = 8


def judged(play: Play) -> Judged:
    story = SmallStory("told", "", play)
    return Judged(lambda _: story, "told", "shared")


def player(play: Play, rounds: int) -> Living:
    return judged(play)(rounds)


def beside(expected: Callable[[int], bool]) -> Play:
    """A device copies what a vCPU stores; `expected`: of a round, from 0 on, that it is well."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(4)
        for number in excerpt.rounds():
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.copy, PAGE_SIZE, 0)
                    await guest.write(0, b"store")
            ctx.expect(expected(number), f"I0: round {number}")

    return play


def test_a_machine_is_good_for_so_many_rounds_each_a_schedule() -> None:
    playing = player(beside(lambda number: True), ROUNDS)
    ends = [playing(RandomWalk(n)) for n in range(ROUNDS + 1)]
    assert [(end.round, end.over) for end in ends] == [
        *((n, n + 1 == ROUNDS) for n in range(ROUNDS)),
        (0, False),
    ]
    assert not any(end.invariant for end in ends)
    playing.renew()


def worlds() -> int:
    return sum(type(thing) is World for thing in gc.get_objects())


def test_a_machine_that_is_cut_off_leaves_nothing_behind() -> None:
    """Or each garbage collection would take longer than the one before, and the next machine with it."""

    gc.collect()  # those of other tests
    before = worlds()
    for _ in range(2):
        playing = player(beside(lambda number: True), ROUNDS)
        playing(RandomWalk(1))
        assert worlds() > before, "it stands in the middle"
        playing.renew()
    gc.collect()
    assert worlds() == before


def test_what_a_machine_leaves_at_its_end_is_young() -> None:
    """To look at what is old takes longer the more of it there is."""
    gc.collect()
    before = worlds()
    for _ in range(2):
        assert not Judged(find, "fault", "shared")(1)(Recorded(Replay(()))).invariant
    gc.collect(0)
    assert worlds() == before


@pytest.mark.parametrize(
    ("story", "design"),
    [
        (name, design)
        for name, story in STORIES.items()
        for design in ("mirror", "shared")
        if design in story.playable
    ],
)
def test_a_story_leaves_its_machine_as_it_found_it(story: str, design: str) -> None:
    """So that a schedule of a later round is one trace with the same schedule of an earlier one.  Only the
    first finds tables that nobody has used yet, and only behind the last the machine is taken down.
    """
    playing, recorded = Judged(find, story, design)(4), Recorded(Replay(()))
    traces = []
    for _ in range(3):
        assert not playing(recorded).invariant
        traces.append(recorded.trace)
        recorded.ended(False)
    playing.renew()
    assert traces[1] == traces[2]


@pytest.mark.parametrize(("breaks", "before"), [(0, 0), (3, 3)])
def test_what_breaks_in_a_later_round_is_played_again_with_those_before(breaks: int, before: int) -> None:
    told = judged(beside(lambda number: number != breaks))
    (found,) = explore(told(ROUNDS), RandomWalk(1), 1, ROUNDS, lambda tally: bool(tally.found)).found
    assert found.schedule == breaks + 1
    small, _ = smallest(told, found)
    assert small is not None
    assert (small.result.invariant, small.answers) == ("I0", ())
    assert len(small.before) == before


def test_of_what_is_said_what_names_its_invariant_says_what_it_is() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        for _ in excerpt.rounds():
            ctx.expect(False, "what came of it")
            ctx.expect(False, "I0: what was broken")

    assert player(play, 1)(RandomWalk(0)).invariant == "I0"


def test_a_machine_that_broke_is_not_played_on() -> None:
    playing = player(beside(lambda number: number != 2), ROUNDS)
    ends = [playing(RandomWalk(n)) for n in range(5)]
    assert [(end.invariant, end.round) for end in ends] == [("", 0), ("", 1), ("I0", 2), ("", 0), ("", 1)]
    playing.renew()


def test_what_the_end_of_a_machine_shows_is_its_last_rounds() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        await ctx.boot_for(1)
        for _ in excerpt.rounds():
            excerpt.open()
            excerpt.close()
        ctx.expect(False, "I0: at the end")

    playing = player(play, 3)
    assert [playing(RandomWalk(0)).invariant for _ in range(3)] == ["", "", "I0"]


def test_what_the_end_of_a_machine_shows_is_found_though_it_could_have_had_more_rounds() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        await ctx.boot_for(1)
        for _ in excerpt.rounds():
            with excerpt:
                await trio.lowlevel.checkpoint()
        ctx.expect(False, "I0: at the end")

    told = judged(play)
    (found,) = explore(told(ROUNDS), RandomWalk(1), 1, 3).found
    assert (found.schedule, found.result.round, len(found.before)) == (3, 2, 2)
    small, _ = smallest(told, found)
    assert small is not None
    assert (small.result.invariant, small.before) == ("I0", ())


@pytest.mark.parametrize("faults", [(), ("enomem",)])
@pytest.mark.parametrize("opens", [0, 2])
def test_a_round_that_never_opens_its_excerpt_is_not_said_to_hold(opens: int, faults: Sequence[str]) -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(1)
        for number in excerpt.rounds():
            if number < opens:
                excerpt.open()
            await guest.write(0, b"store")
            if number < opens:
                excerpt.close()

    story = SmallStory("told", "", play)
    playing = Judged(lambda _: story, "told", "shared", faults=faults)(ROUNDS)
    ends = [playing(Replay(())) for _ in range(opens + 1)]
    assert [end.invariant for end in ends] == [*[""] * opens, OTHER]
    assert "did not open its excerpt" in ends[-1].sentence


def test_who_compares_schedules_is_told_of_a_story_that_never_opens() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        await ctx.boot_for(1)

    tally = explore(Forked(judged(play)), Exhaustive(), 0, 5)
    assert [found.result.invariant for found in tally.found] == [OTHER]
    assert "did not open its excerpt" in tally.found[0].result.sentence


async def breaks_and_ends_otherwise(ctx: Context, excerpt: Excerpt) -> None:
    guest = await ctx.boot_for(1)
    for _ in excerpt.rounds():
        with excerpt:
            await guest.write(0, b"store")
        ctx.expect(False, "the store is lost")
    ctx.expect(False, "I0: what the end of the machine shows of it")


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_round_is_judged_before_the_end_of_its_machine_wherever_it_is_the_last(rounds: int) -> None:
    """Or a failure would be another one where it is played again, in as many rounds as there were."""
    told = judged(breaks_and_ends_otherwise)
    (found,) = explore(told(rounds), RandomWalk(1), 1, 1).found
    assert found.result.sentence == "the store is lost"
    small, _ = smallest(told, found)
    assert small is not None
    assert small.result == found.result
    (compared,) = explore(Forked(told), Exhaustive(), 0, 1).found
    assert compared.result.sentence == found.result.sentence


class Listens:
    """Onlooker."""

    def __init__(self) -> None:
        self.journal = Journal()

    def sees(self, watch: Watch) -> None: ...


@pytest.mark.parametrize(("story", "faults"), [("discard", ()), ("moves", ()), ("lend-dies", ALL.split(","))])
def test_a_machine_that_is_finished_ends_as_one_that_has_had_all_its_rounds(
    story: str, faults: Sequence[str]
) -> None:
    """Or what its end shows would not be there when it is played again."""
    told, ends = Judged(find, story, "shared", faults=faults), []
    for rounds in (2, ROUNDS):
        listens, walk = Listens(), Recorded(RandomWalk(13))  # with faults seldom a machine is there for two
        playing = told(rounds, listens)
        for _ in range(2):
            end = playing(walk)
            walk.ended(False)
            assert end.faulted or not faults
        if rounds == ROUNDS:
            assert not end.over
            end = playing.finish()
        assert (end.over, end.round) == (True, 1)
        ends.append((end, listens.journal.digest))
    assert ends[0] == ends[1]


class GivesUp(Replay):
    """How often; at the `enough`-th time it gives up."""

    def __init__(self, answers: Answers, enough: int | None = None) -> None:
        super().__init__(answers)
        self.times = 0
        self._enough = enough

    def choose(self, options: Sequence[Option]) -> int:
        self.times += 1
        return STOP if self.times == self._enough else super().choose(options)


def test_what_was_seen_before_a_schedule_was_given_up_is_told_of() -> None:
    planted = Judged(find, "discard", "shared", plant="R4-acks-not-awaited")
    (found,) = explore(planted(), RandomWalk(1), 1, 60, lambda tally: bool(tally.found)).found
    to_its_end = GivesUp(found.answers)
    planted()(to_its_end)
    ends = [planted()(GivesUp(found.answers, enough)) for enough in (1, to_its_end.times)]
    assert [(end.invariant, end.over) for end in ends] == [("", True), (found.result.invariant, True)]


def test_what_does_something_when_it_goes_goes_between_runs() -> None:
    """In the middle of one it would be another run each time: what else there is to collect decides when."""
    gone = []

    class Cycle:
        def __init__(self, number: int) -> None:
            self.me, self.number = self, number

        def __del__(self) -> None:
            gone.append(self.number)

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        for number in excerpt.rounds():
            with excerpt:
                Cycle(number)
                _ = [[] for _ in range(100_000)]  # reason enough to collect
            ctx.expect_equal(gone, [], "I0: those that went")

    assert gc.isenabled()
    playing = player(play, 2)
    assert not any(playing(RandomWalk(n)).invariant for n in range(2))
    assert gc.isenabled()
    gc.collect()
    assert sorted(gone) == [0, 1]
