"""An excerpt: what is outside is by default and unheard of, what is inside is searched in full."""

from __future__ import annotations

import pytest

from simulator.search.excerpt import Excerpt
from simulator.search.exhaustive import Exhaustive
from simulator.search.option import Option, Touch
from simulator.search.replay import Recorded
from simulator.search.walk import RandomWalk
from tests.unit.simulator.search.toy import PROGRAMS, Op, Program, ToyMachine, play

JUDGE = Touch(("judge", "something"), True)
BUFFERING, TRACES = PROGRAMS["store buffering"]
BEFORE, BEHIND = Op("store", "before", 1), Op("store", "behind", 1)
STORY = Program({name: (BEFORE, *ops, BEHIND) for name, ops in BUFFERING.processes.items()})


def play_story(excerpt: Excerpt) -> list[Option]:
    """Opens when both are past the first store, closes when all is done but the last two."""

    def judge(machine: ToyMachine) -> bool:
        left = [len(ops) for ops in machine.left.values()]
        if max(left) == 3 and sum(left) == 6:
            excerpt.open()
        if sum(left) == 2:
            excerpt.close()
        return False

    return play(STORY, excerpt, judge).steps


class _BothFirst(Excerpt):
    """Outside, whoever has more left goes on: both come to the edge of the excerpt."""

    def choose(self, options: list[Option]) -> int:  # type: ignore[override]
        if not self._open and "before" in options[-1].label:
            return len(options) - 1
        return super().choose(options)


def test_inside_every_trace_is_run() -> None:
    search = Exhaustive()
    excerpt = _BothFirst(search)
    runs = []
    while True:
        runs.append(play_story(excerpt))
        if not excerpt.ended(False):
            break
    assert search.traces == TRACES
    assert len(runs) == TRACES + search.pruned
    for steps in runs:
        assert [step.label for step in steps[:2]] == ["store before 1"] * 2


@pytest.mark.parametrize("seed", range(5))
def test_outside_all_is_by_default_and_nothing_is_heard(seed: int) -> None:
    recorded = Recorded(RandomWalk(seed), steps=True)
    never = Excerpt(recorded)
    assert play(STORY, never).steps == play(STORY, Excerpt(RandomWalk(seed + 1))).steps
    assert recorded.steps == []
    assert recorded.answers == ()


def test_the_step_under_way_belongs_to_what_was_before() -> None:
    recorded = Recorded(RandomWalk(0), steps=True)
    excerpt = Excerpt(recorded)
    one, two, three = (Option(name, "") for name in "ABC")
    excerpt.choose([one, two])
    excerpt.open()
    excerpt.took(one)
    excerpt.choose([two, three])
    excerpt.close()
    excerpt.took(two)
    excerpt.took(three)
    assert recorded.steps == [two]


def test_a_search_whose_last_step_was_never_told_goes_on() -> None:
    """A run that ends in the middle of a step."""
    search = Exhaustive()
    options = [Option("A", "crashes"), Option("B", "stores")]
    assert search.choose(options) == 0
    assert not search.ended(True)
    assert search.over


def test_a_step_that_the_judge_hears_of_touches_what_he_goes_by() -> None:
    inner = Recorded(RandomWalk(1), steps=True)
    excerpt = Excerpt(inner)
    with excerpt:
        for heard in ((), (JUDGE,), ()):
            excerpt.choose([Option("A", ""), Option("B", "")])
            excerpt.heard = lambda heard=heard: frozenset(heard)  # type: ignore[misc]
            excerpt.took(Option("A", ""))
    assert [step.touches for step in inner.steps] == [frozenset(), {JUDGE}, frozenset()]
