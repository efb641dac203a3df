"""Counting schedules, and making a failing one small, on a toy."""

from __future__ import annotations

from itertools import count

import pytest

from simulator.search.coverage import Coverage
from simulator.search.exhaustive import Exhaustive
from simulator.search.explore import UNNAMED, Found, RunEnd, Tally, explore, replayed, smallest
from simulator.search.option import Option, Strategy
from simulator.search.replay import Replay
from simulator.search.strategies import STRATEGIES
from simulator.search.walk import RandomWalk
from tests.unit.simulator.search.toy import PROGRAMS, Anew, Program, ToyMachine, every_run, order_of, play

PROGRAM, TRACES = PROGRAMS["store buffering"]


def both_saw_nothing(machine: ToyMachine) -> bool:
    return {("A", "y", 0), ("B", "x", 0)} <= set(machine.seen)


def both_saw_all(machine: ToyMachine) -> bool:
    return {("A", "y", 1), ("B", "x", 1)} <= set(machine.seen)


@Anew
def well(strategy: Strategy) -> RunEnd:
    return RunEnd("T1", "impossible") if play(PROGRAM, strategy, both_saw_nothing).failed else RunEnd()


@Anew
def badly(strategy: Strategy) -> RunEnd:
    return RunEnd("T2", "both saw it") if play(PROGRAM, strategy, both_saw_all).failed else RunEnd()


def test_traces_are_counted_not_schedules() -> None:
    tally = explore(well, RandomWalk(0), 0, 500)
    assert tally.schedules == 500
    assert len(tally.traces) == len({order_of(run.steps) for run in every_run(PROGRAM)}) == TRACES
    assert tally.found == []
    assert not tally.over


def faulted(program: Program) -> Anew:
    """Each of its runs meets a fault."""
    return Anew(lambda strategy: RunEnd(faulted=bool(play(program, strategy).steps)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_search_that_ends_ends_the_exploration(name: str) -> None:
    """And the two count alike, also a run that nobody stopped because no choice was left."""
    program, traces = PROGRAMS[name]
    tally = explore(faulted(program), search := Exhaustive(), 0, 500)
    assert tally.over
    assert (tally.schedules, tally.faulted) == (search.traces, search.traces) == (traces, traces)
    assert tally.given_up == search.pruned
    summary = f"all {traces} inequivalent interleavings, {search.pruned} pruned"
    assert tally.summary == search.summary() == summary


def test_a_failure_in_a_run_that_is_given_up_counts() -> None:
    """Each run of these that nobody stops fails, also one that is known to be explored elsewhere."""
    lost = 0
    for program, traces in PROGRAMS.values():
        search = Exhaustive()

        def fails(strategy: Strategy, program: Program = program) -> RunEnd:
            return RunEnd() if play(program, strategy).stopped else RunEnd("T1", "each does")

        tally = explore(Anew(fails), search, 0, 500)
        assert tally.schedules == traces
        assert len(tally.found) == search.failed
        assert search.summary().endswith(f", {search.failed} ended by a failure")
        lost += search.failed - traces
    assert lost, "no toy has such a run"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_finds_and_what_is_found_becomes_small(name: str) -> None:
    tally = explore(badly, STRATEGIES[name].make(5), 5, 500, lambda tally: bool(tally.found))
    found = tally.found[-1]
    assert found.seed == 5
    assert found.schedule == tally.schedules + tally.given_up
    small, replays = smallest(lambda _: badly, found)
    assert small is not None
    assert small.result[:2] == ("T2", "both saw it")
    assert len([answer for answer in small.answers if answer]) == 1
    assert 1 <= replays < 20


def test_tallies_of_two_processes_add_up() -> None:
    one = explore(well, RandomWalk(1), 1, 30, coverage=Coverage())
    other = explore(badly, RandomWalk(2), 2, 40, coverage=Coverage())
    both = Tally()
    both.add(one)
    both.add(other)
    assert both.schedules == 70
    assert both.traces == one.traces | other.traces
    assert both.covered == one.covered | other.covered
    assert both.found == other.found


class Living:
    """Player of rounds: breaks when both saw all for the second time in one machine."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.machines: list[list[bool]] = [[]]

    def __call__(self, strategy: Strategy) -> RunEnd:
        saw, number = play(PROGRAM, strategy, both_saw_all).failed, len(self.machines[-1])
        self.machines[-1].append(saw)
        failed = saw and self.machines[-1].count(True) == 2
        if over := failed or number + 1 == self._rounds:
            self.machines.append([])
        return RunEnd("T3" if failed else "", "again" if failed else "", number, over)

    def finish(self) -> RunEnd:
        self.renew()
        return RunEnd()

    def renew(self) -> None:
        if self.machines[-1]:
            self.machines.append([])


def test_what_fails_because_of_a_round_before_keeps_that_round_and_no_other() -> None:
    player = Living(50)
    (found,) = explore(player, RandomWalk(3), 3, 50, lambda tally: bool(tally.found)).found
    assert len(found.before) == found.result.round == found.schedule - 1 > 1
    small, _ = smallest(Living, found)
    assert small is not None
    assert len(small.before) == small.result.round == 1
    assert replayed(Living, small.before, Replay(small.answers))[:2] == ("T3", "again")


def test_a_failure_is_as_long_as_all_that_was_chosen_in_its_machine() -> None:
    """Of answers that are needed none is in the last round."""
    assert Found(0, 3, RunEnd("T1", "", 2), (0, 0), 0, ((0, 2, 1), (), (1,))).chosen == 3


def test_rounds_before_are_left_out_one_by_one_no_longer_than_there_are_replays() -> None:
    (found,) = explore(Living(50), RandomWalk(3), 3, 50, lambda tally: bool(tally.found)).found
    small, replays = smallest(Living, found, 0)
    assert small is not None
    assert (replays, small.before) == (1, found.before)
    _, replays = smallest(Living, found, 2)
    assert replays <= 2 + 2


def test_what_the_end_of_a_machine_shows_becomes_small() -> None:
    """A machine that comes to its end with the last schedule, however few there were before it."""

    class Ends(Living):
        def __call__(self, strategy: Strategy) -> RunEnd:
            end = super().__call__(strategy)
            return RunEnd("T4" if end.over else "", "at its end", end.round, end.over)

    (found,) = explore(Ends(9), RandomWalk(3), 3, 9, lambda tally: bool(tally.found)).found
    small, _ = smallest(Ends, found)
    assert small is not None
    assert (small.result.invariant, small.before, small.answers) == ("T4", (), ())


def test_an_exploration_begins_and_ends_with_a_machine_of_its_own() -> None:
    player = Living(3)
    player(RandomWalk(0))
    explore(player, RandomWalk(1), 1, 4)
    first, *others = player.machines
    assert len(first) == 1
    assert sum(map(len, others)) == 4
    assert others[-1] == []


def test_a_schedule_that_does_not_fail_again_is_not_called_small() -> None:
    assert smallest(lambda _: well, Found(0, 1, RunEnd("T1", "once"), (0, 1), 0)) == (None, 1)


@pytest.mark.parametrize("unnamed", UNNAMED)
def test_what_names_no_invariant_is_not_shrunk_into_what_says_something_else(unnamed: str) -> None:
    options = [Option("A", "x"), Option("B", "y")]
    handles = count()

    @Anew
    def two_failures(strategy: Strategy) -> RunEnd:
        one, two = strategy.choose(options), strategy.choose(options)
        said = f"the store to {next(handles):#x} is lost" if one else "kvmd: AssertionError"
        return RunEnd(unnamed, said) if two else RunEnd()

    found = Found(0, 1, two_failures(Replay((1, 1))), (1, 1), 0)
    small, _ = smallest(lambda _: two_failures, found)
    assert small is not None
    assert small.answers == (1, 1)
    assert "is lost" in small.result.sentence, "of another handle"
