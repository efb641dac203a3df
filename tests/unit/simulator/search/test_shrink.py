"""Shrinking, against stories whose smallest schedule is known."""

from __future__ import annotations

from random import Random

import pytest

from simulator.search.replay import Answers, Recorded, Replay, trimmed
from simulator.search.shrink import shrink
from simulator.search.walk import RandomWalk
from tests.unit.simulator.search.toy import Op, Program, ToyMachine, every_run, every_schedule, play

OWN = tuple(Op("store", f"own {word}", 1) for word in range(20))
LOST_STORE = Program(
    {
        "A": (*OWN, Op("load", "x"), Op("store", "x", 1)),
        "B": (*OWN, Op("load", "x"), Op("store", "x", 2)),
        "C": OWN,
    }
)


def lost(machine: ToyMachine) -> bool:
    """Both have seen the word before either stored: one of the stores is lost."""
    return {("A", "x", 0), ("B", "x", 0)} <= set(machine.seen)


def fails(answers: Answers) -> bool:
    return play(LOST_STORE, Replay(answers), lost).failed


def nonzero(answers: Answers) -> list[int]:
    return [answer for answer in answers if answer]


@pytest.mark.parametrize("seed", range(10))
def test_a_long_schedule_becomes_the_one_switch_that_matters(seed: int) -> None:
    recorded = Recorded(RandomWalk(seed))
    failing = next(run for run in every_schedule(LOST_STORE, recorded, lost) if run.failed)
    assert len(nonzero(tuple(failing.answers))) > 20
    shrunk = shrink(recorded.answers, fails)
    assert fails(shrunk.answers)
    assert len(nonzero(shrunk.answers)) <= 22, "B's 20 steps of its own, at most, and its load"
    for place, answer in enumerate(shrunk.answers):
        for less in range(answer):
            assert not fails(trimmed([*shrunk.answers[:place], less, *shrunk.answers[place + 1 :]]))
    assert shrunk.replays < 400


def test_what_fails_by_default_shrinks_to_nothing_in_one_replay() -> None:
    assert shrink((3, 0, 1, 2), lambda answers: True).answers == ()
    assert shrink((3, 0, 1, 2), lambda answers: True).replays == 1


def test_the_smallest_subset_is_found_whatever_stands_around_it() -> None:
    random = Random(0)
    for _ in range(50):
        answers = trimmed(random.randrange(4) for _ in range(100))
        needed = {
            place: random.randint(1, answers[place])
            for place in random.sample(range(90), 3)
            if answers[place]
        }

        def all_needed(tried: Answers, needed: dict[int, int] = needed) -> bool:
            return all(place < len(tried) and tried[place] >= least for place, least in needed.items())

        shrunk = shrink(answers, all_needed)
        assert {place: answer for place, answer in enumerate(shrunk.answers) if answer} == needed


def test_an_answer_moves_towards_the_default() -> None:
    assert shrink((0, 5), lambda answers: len(answers) == 2 and answers[1] in (2, 5)).answers == (0, 2)


def test_without_replays_left_the_best_so_far_is_the_answer() -> None:
    def needs_two(answers: Answers) -> bool:
        return len(nonzero(answers)) >= 2

    shrunk = shrink((1,) * 64, needs_two, replays_max=3)
    assert shrunk.replays == 3
    assert needs_two(shrunk.answers)
    assert len(nonzero(shrunk.answers)) == 16


def test_the_first_bad_run_of_brute_force_needs_no_fewer_switches() -> None:
    """The oracle: the fewest answers that are not the default, among all runs of a smaller program."""
    program = Program({name: (Op("store", "own", 1), *LOST_STORE.processes[name][-2:]) for name in "AB"})
    bad = [run for run in every_run(program, lost) if run.failed]
    least = min(len(nonzero(tuple(run.answers))) for run in bad)
    small = [
        shrink(tuple(run.answers), lambda tried: play(program, Replay(tried), lost).failed) for run in bad
    ]
    sizes = [len(nonzero(shrunk.answers)) for shrunk in small]
    assert min(sizes) == least
    assert max(sizes) <= least + 2
