"""Strategies on toy programs: what each promises, and that its promise would be seen broken."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from simulator.search.coverage import Coverage
from simulator.search.delay import DelayBound
from simulator.search.mutation import Mutation
from simulator.search.option import Option, Strategy, Touch, UnrepeatableError
from simulator.search.pct import PriorityChanges
from simulator.search.racing import HELD_MAX, Racing
from simulator.search.replay import Recorded, Replay
from simulator.search.strategies import STRATEGIES
from simulator.search.walk import RandomWalk
from tests.unit.simulator.search.toy import (
    PROGRAMS,
    Op,
    Program,
    ToyMachine,
    every_run,
    every_schedule,
    play,
)

BUFFERING, _ = PROGRAMS["store buffering"]
CHANNELS, _ = PROGRAMS["two channels of one process"]

# B must run between two stores of A, behind 60 that nobody else can see, and C there as well, behind B.
OWN_STORES = tuple(Op("store", f"own {word}", 1) for word in range(60))
WINDOW = Program(
    {
        "A": (
            *(Op("store", f"own {word}", 1) for word in range(60)),
            Op("store", "x", 1),
            Op("store", "x", 2),
        ),
        "B": (Op("load", "x"), Op("store", "y", 1)),
        "C": (Op("load", "y"), Op("load", "x")),
    }
)


def in_window(machine: ToyMachine) -> bool:
    return {("B", "x", 1), ("C", "y", 1), ("C", "x", 1)} <= set(machine.seen)


def finds(strategy: Strategy, runs: int) -> bool:
    return any(run.failed for run in islice(every_schedule(WINDOW, strategy, in_window), runs))


@pytest.mark.parametrize("program", [BUFFERING, CHANNELS, WINDOW], ids=["buffering", "channels", "window"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_answers_repeat_the_run(name: str, program: Program) -> None:
    recorded = Recorded(STRATEGIES[name].make(7))
    for run in islice(every_schedule(program, recorded), 20):
        if run.stopped:
            continue
        again = Recorded(replay := Replay(recorded.answers))
        assert play(program, again).steps == run.steps
        assert again.trace == recorded.trace
        assert replay.misfits == 0


@pytest.mark.parametrize("name", [name for name, named in STRATEGIES.items() if named.seeded])
def test_a_seed_says_all_schedules(name: str) -> None:
    def steps(seed: int) -> list[list[Option]]:
        strategy = STRATEGIES[name].make(seed)
        return [run.steps for run in islice(every_schedule(WINDOW, strategy), 30)]

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)


def test_by_turns_each_plays_as_it_does_alone() -> None:
    """Which of them plays a schedule, and which of its own that is, goes by the schedule's number."""

    def steps(name: str, count: int) -> list[list[Option]]:
        strategy = STRATEGIES[name].make(7)
        return [run.steps for run in islice(every_schedule(WINDOW, strategy), count)]

    alone = [steps(name, 10) for name in ("random", "rare", "pct", "racing")]
    assert steps("mixed", 40) == [alone[number % 4][number // 4] for number in range(40)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_reaches_every_end_of_a_small_program(name: str) -> None:
    ends = {repr(run.machine.outcome()) for run in every_run(BUFFERING)}
    runs = islice(every_schedule(BUFFERING, strategy := STRATEGIES[name].make(0)), 200)
    assert {repr(run.machine.outcome()) for run in runs if not run.stopped} == ends
    assert strategy.summary()


@pytest.mark.parametrize("seed", range(5))
def test_steps_against_the_default_are_marked(seed: int) -> None:
    recorded = Recorded(RandomWalk(seed), steps=True)
    run = play(WINDOW, recorded)
    assert recorded.steps == run.steps
    machine, against = ToyMachine(WINDOW), []
    for place, step in enumerate(run.steps):
        if (options := machine.options())[0] != step:
            against.append(place)
        machine.take(next(option for option in options if option.actor == step.actor))
    assert recorded.against == against


def test_answers_that_do_not_fit_become_the_default_and_are_counted() -> None:
    default = play(BUFFERING, Replay(()))
    damaged = Replay([0, 9, 0, 0, 0, 0, 0, 1])
    assert play(BUFFERING, damaged).steps == default.steps
    assert damaged.misfits > 1


def test_a_walk_leaves_the_default_as_often_as_it_says() -> None:
    options = [Option(name, "") for name in "ABC"]
    walk = RandomWalk(0, 0.1)
    answers = [walk.choose(options) for _ in range(10_000)]
    assert 850 < len([answer for answer in answers if answer]) < 1150
    assert 400 < answers.count(2) < 600


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pct_keeps_its_bound(depth: int) -> None:
    """Bugs of that depth: B first; B between A's stores; and C there as well, behind B."""
    judges: list[Callable[[ToyMachine], bool]] = [
        lambda machine: ("B", "x", 0) in machine.seen,
        lambda machine: ("B", "x", 1) in machine.seen,
        in_window,
    ]
    runs, found = 1_500, 0
    pct = PriorityChanges(0, depth)
    for run in islice(every_schedule(WINDOW, pct, judges[depth - 1]), runs):
        found += run.failed
    assert found / runs >= pct.bound()
    assert pct.length < 20, "the stores nobody else can see count"


def test_pct_counts_the_runs_that_its_estimate_is_of() -> None:
    """Not those before a run had as many steps, whose changes came too early, nor those that were held up."""
    shared = frozenset({Touch("x", True)})
    options = [Option(name, "stores", shared) for name in "AB"]
    pct = PriorityChanges(0, in_a_row_max=4)

    def run(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            pct.took(options[pct.choose(options)])
        pct.ended(False)
        return pct.runs, pct.whole

    for option in options:
        pct.took(option)
    assert [run(3), run(3), run(2), run(3)] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert run(4) == (5, 0), "it was longer"
    assert run(4) == (6, 1)
    assert pct.summary().startswith("pct, 6 runs: an estimate for 1 of them is ")
    pct.length = 100
    assert run(50) == (7, 1), "four steps in a row and more"


class _CountsAll(PriorityChanges):
    def _is_shared(self, step: Option) -> bool:
        return True


def test_change_points_drown_where_every_step_counts() -> None:
    """Why only steps that others can see are counted."""
    assert finds(PriorityChanges(0), 200)
    assert not finds(_CountsAll(0), 200)


@pytest.mark.parametrize("seed", range(8))
def test_pct_starves_nobody_for_ever(seed: int) -> None:
    pct = PriorityChanges(seed, in_a_row_max=10)
    options = [Option(name, "retry", frozenset({Touch("x", False)})) for name in "AB"]
    actors = [options[pct.choose(options)].actor for _ in range(100)]
    assert max(len(part) for who in "AB" for part in "".join(actors).split(who)) <= 11


def test_pct_starves_nobody_beside_those_who_keep_each_other_busy() -> None:
    """One asks, the other answers, in turns for ever: no one of them goes on many times in a row."""
    pct = PriorityChanges(0, waits_max=50)
    patient = Option("P", "works", frozenset())
    for name in "ABP":
        pct.choose([Option(name, "begins", frozenset())])
    pct._priority |= {"A": 3.0, "B": 2.5, "P": 1.0}
    went = []
    for turn in range(200):
        options = [Option("AB"[turn % 2], "asks or answers", frozenset()), patient]
        went.append(options[pct.choose(options)].actor)
    assert went.index("P") == 51, "it had waited for more than 50"
    pct.ended(False)
    assert (pct.runs, pct.whole) == (1, 0), "nothing is promised of it"


def test_what_one_process_alone_touches_does_not_count_whatever_it_is_told() -> None:
    """Its state is touched by its own steps and by all that is told it, each of them an actor."""
    pct = PriorityChanges(0)
    for actor in ("A", "A<door", "A<bell", "A/recv"):
        pct.took(Option(actor, "goes on", frozenset({Touch("A's state", True)})))
    pct.took(Option("A", "sends", frozenset({Touch("queue", True)})))
    pct.took(Option("B<queue", "is told", frozenset({Touch("queue", True)})))
    assert pct._shared.places == {"queue"}


def test_a_way_within_a_step_is_no_step_that_goes_by_priorities() -> None:
    pct = PriorityChanges(0, in_a_row_max=4)
    shared = frozenset({Touch("x", True)})
    for actor in "AB":
        pct.took(Option(actor, "stores", shared))
    ways = [Option("A/recv", way, shared) for way in ("one frame", "all frames")]
    drawn = {pct.choose(ways) for _ in range(50)}
    pct.ended(False)
    assert drawn == {0, 1}
    assert (pct.actors, pct.length, pct.whole) == (1, 1, 1), "nobody was drawn a priority, none counted"


def told_of_both(racing: Racing) -> list[Option]:
    """A and B store to x, as racing has seen them do."""
    steps = [Option(name, "stores", frozenset({Touch("x", True)})) for name in "AB"]
    for step in steps:
        racing.took(step)
    return steps


def test_who_was_held_comes_right_behind_another_s_access() -> None:
    racing = Racing(0, holds=1, switch=0.0)
    a, b = told_of_both(racing)
    own, other = Option("B", "works"), Option("A", "works")
    assert racing.choose([a, own]) == 1, "A is held at its first access"
    racing.took(own)
    assert racing.choose([a, own]) == 1
    racing.took(own)
    assert racing.choose([a, b]) == 1
    racing.took(b)
    assert racing.met == 1
    assert racing.choose([own, a]) == 1, "against the default"
    racing.took(a)
    assert racing.choose([own, other]) == 0


def test_who_is_held_goes_on_where_nobody_else_can() -> None:
    racing = Racing(0, holds=1, switch=0.0)
    a, b = told_of_both(racing)
    assert racing.choose([a, a._replace(label="stores otherwise")]) == 0
    racing.took(a)
    racing.took(b)
    assert racing.met == 0, "it is held no more"


def test_nobody_is_held_for_ever_beside_those_who_keep_each_other_busy() -> None:
    racing = Racing(0, holds=1, switch=0.0)
    a, _ = told_of_both(racing)
    went = 0
    while racing.choose([a, busy := Option("CD"[went % 2], "asks or answers")]):
        racing.took(busy)
        went += 1
    assert went == HELD_MAX + 1


def test_reads_of_one_word_do_not_race() -> None:
    racing = Racing(0, holds=1, switch=0.0)
    told_of_both(racing)
    a, b = (Option(name, "loads", frozenset({Touch("x", False)})) for name in "AB")
    assert racing.choose([a, b]) == 1
    racing.took(b)
    assert racing.met == 0


def test_holds_find_what_needs_two_accesses_in_the_other_order() -> None:
    assert finds(Racing(0), 100)
    assert not finds(Racing(0, holds=0, switch=0.0), 100)


@pytest.mark.parametrize("program", [BUFFERING, CHANNELS], ids=["buffering", "channels"])
def test_delays_come_in_order_and_each_schedule_once(program: Program) -> None:
    bound = Recorded(search := DelayBound())
    schedules, costs = [], []
    for run in every_schedule(program, bound):
        schedules.append(run.steps)
        costs.append(sum(run.answers))
        assert costs[-1] == sum(bound.answers)
    everything = [run.steps for run in every_run(program)]
    assert len(schedules) == len(everything)
    assert all(steps in schedules for steps in everything)
    assert costs == sorted(costs)
    assert search.summary() == f"all {len(everything)} schedules"


def test_a_bound_that_was_reached_is_printed_with_what_is_left() -> None:
    search = DelayBound(delays_max=1)
    runs = list(every_schedule(BUFFERING, search))
    assert search.summary() == f"{len(runs)} schedules, delay bound 1 done, at least 2 left"


def test_a_bound_is_not_said_of_runs_that_do_not_repeat() -> None:
    """A choice with another number of options than before, or none any more."""
    options = [Option(name, "stores") for name in "ABC"]

    def under_way() -> DelayBound:
        search = DelayBound()
        search.choose(options[:2])
        assert search.ended(False)
        return search

    with pytest.raises(UnrepeatableError, match="choice 0 has 3 options, in an earlier run 2"):
        under_way().choose(options)
    with pytest.raises(UnrepeatableError, match="0 choices, in an earlier run 1 or more"):
        under_way().ended(False)


def test_coverage_counts_what_is_new() -> None:
    coverage = Coverage()
    store, load = (
        Option(who, what, frozenset({Touch("x", what == "store")}))
        for who, what in [("A", "store"), ("B", "load")]
    )
    news = []
    for steps in [(store, load), (store, load), (load, store), (store, store), (load, load)]:
        for step in steps:
            coverage.took(step)
        news.append(coverage.ended())
    assert news == [2, 0, 2, 0, 0], "a transition and a race; the same again; both the other way round"


def test_mutation_keeps_what_showed_something_new_and_no_more() -> None:
    mutation = Mutation(3)
    coverage, kept = Coverage(), 0
    for run in islice(every_schedule(BUFFERING, mutation), 300):
        for step in run.steps:
            coverage.took(step)
        kept += bool(coverage.ended())
    assert len(mutation.kept) == kept < 20
