"""Counting schedules, and making a failing one small, on a toy."""

from __future__ import annotations

import pytest

from simulator.search.exhaustive import Exhaustive
from simulator.search.explore import Found, RunEnd, Tally, explore, smallest
from simulator.search.option import Strategy
from simulator.search.strategies import STRATEGIES
from simulator.search.walk import RandomWalk
from tests.unit.simulator.search.toy import PROGRAMS, ToyMachine, every_run, order_of, play

PROGRAM, TRACES = PROGRAMS["store buffering"]


def both_saw_nothing(machine: ToyMachine) -> bool:
    return {("A", "y", 0), ("B", "x", 0)} <= set(machine.seen)


def both_saw_all(machine: ToyMachine) -> bool:
    return {("A", "y", 1), ("B", "x", 1)} <= set(machine.seen)


def well(strategy: Strategy) -> RunEnd:
    return RunEnd("T1", "impossible") if play(PROGRAM, strategy, both_saw_nothing).failed else RunEnd()


def badly(strategy: Strategy) -> RunEnd:
    return RunEnd("T2", "both saw it") if play(PROGRAM, strategy, both_saw_all).failed else RunEnd()


def test_traces_are_counted_not_schedules() -> None:
    tally = explore(well, RandomWalk(0), 0, 500)
    assert tally.schedules == 500
    assert len(tally.traces) == len({order_of(run.steps) for run in every_run(PROGRAM)}) == TRACES
    assert tally.found == []
    assert not tally.over


def test_a_search_that_ends_ends_the_exploration() -> None:
    tally = explore(well, search := Exhaustive(), 0, 500)
    assert (tally.schedules, tally.given_up, tally.over) == (TRACES, search.pruned, True)
    assert (
        tally.summary
        == search.summary()
        == f"all {TRACES} inequivalent interleavings, {search.pruned} pruned"
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_finds_and_what_is_found_becomes_small(name: str) -> None:
    tally = explore(badly, STRATEGIES[name].make(5), 5, 500, lambda tally: bool(tally.found))
    found = tally.found[-1]
    assert found.seed == 5
    assert found.schedule == tally.schedules + tally.given_up
    small, replays = smallest(badly, found)
    assert small.result == RunEnd("T2", "both saw it")
    assert len([answer for answer in small.answers if answer]) == 1
    assert 1 <= replays < 20


def test_tallies_of_two_processes_add_up() -> None:
    one, other = explore(well, RandomWalk(1), 1, 30), explore(badly, RandomWalk(2), 2, 40)
    both = Tally()
    both.add(one)
    both.add(other)
    assert both.schedules == 70
    assert both.traces == one.traces | other.traces
    assert both.covered == one.covered | other.covered
    assert both.found == other.found


def test_a_schedule_that_does_not_fail_again_is_not_called_small() -> None:
    with pytest.raises(AssertionError, match="does not fail again"):
        smallest(well, Found(0, 1, RunEnd("T1", "once"), (0, 1), 0))
