"""Exhaustive search against brute force: a run of every trace, none twice; mistakes in the search show."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from simulator.search.causality import Causality
from simulator.search.exhaustive import Asleep, Exhaustive, HiddenDependenceError
from simulator.search.option import Option, Touch, UnrepeatableError
from tests.unit.simulator.search.toy import (
    PROGRAMS,
    Op,
    Order,
    Program,
    ToyChannel,
    ToyMachine,
    every_run,
    every_schedule,
    order_of,
    stuck,
)

RUNS_MAX = 400


def explored(program: Program, search: Exhaustive) -> list[Order]:
    return [order_of(run.steps) for run in every_schedule(program, search) if not search.redundant]


def complaint(program: Program, search: Exhaustive) -> str:
    """What brute force knows better."""
    traces = {order_of(run.steps) for run in every_run(program)}
    found = explored(program, search)
    if set(found) != traces:
        return f"{len(traces - set(found))} of {len(traces)} traces missed"
    return f"{len(found)} runs that count for {len(traces)} traces" if len(found) != len(traces) else ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_as_many_interleavings_as_counted_by_hand(name: str) -> None:
    program, traces = PROGRAMS[name]
    search = Exhaustive()
    assert complaint(program, search) == ""
    assert search.traces == traces
    assert search.summary() == f"all {traces} inequivalent interleavings, {search.pruned} pruned"


WORDS = st.sampled_from(["x", "y", "y0", "y1"])
CHANNELS = st.sampled_from("cd")
IN_HANDLERS = st.one_of(
    st.builds(lambda word: (Op("load", word),), WORDS),
    st.builds(lambda word, value: (Op("store", word, value),), WORDS, st.integers(0, 1)),
    st.builds(lambda word, other: (Op("load", word), Op("skip_if_zero", "", 1), Op("store", other, 2)),
              WORDS, WORDS),
    st.builds(lambda ways: (Op("pick", "", ways),), st.just(2)),
    st.builds(lambda lock, op: (Op("lock", lock), op, Op("unlock", lock)), st.sampled_from("LM"),
              st.builds(Op, st.sampled_from(["load", "store"]), WORDS, st.just(1))),
)  # fmt: skip
IN_PROCESSES = st.one_of(
    IN_HANDLERS,
    st.builds(lambda channel: (Op("send", channel),), CHANNELS),
    st.builds(lambda word, channel: (Op("store_send", word, 1, to=channel),), WORDS, CHANNELS),
    st.builds(lambda word: (Op("store_pick", word, 2, to="y"),), WORDS),
    st.builds(lambda seconds: (Op("sleep", "", seconds),), st.integers(1, 3)),
)


def joined(parts: st.SearchStrategy[tuple[Op, ...]], most: int) -> st.SearchStrategy[tuple[Op, ...]]:
    return st.lists(parts, min_size=1, max_size=most).map(
        lambda found: tuple(op for part in found for op in part)
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    names = "ABC"[: draw(st.integers(2, 3))]
    channels = {
        name: ToyChannel(
            draw(st.sampled_from(names)), draw(joined(IN_HANDLERS, 2)), draw(st.sampled_from([1, 2, 8]))
        )
        for name in "cd"
    }
    return Program({name: draw(joined(IN_PROCESSES, 3)) for name in names}, channels)


@settings(max_examples=80, deadline=None)
@given(program=programs())
def test_one_run_of_every_trace_and_none_twice(program: Program) -> None:
    for count, run in enumerate(every_run(program)):
        assume(count < RUNS_MAX and not stuck(run))
    assert complaint(program, Exhaustive()) == ""


class _WantsNothing(Exhaustive):
    """A backtrack point is missing: races are seen, and nothing comes of them."""

    def _want(self, other: int, step: Option, place: int) -> None: ...


class _AdjacentOnly(Exhaustive):
    """Only the last dependent step is looked at, as if no step ever kept another from being taken."""

    def _want(self, other: int, step: Option, place: int) -> None:
        if not any(
            self._whole.before[later] >> other & 1 and self._whole.dependent_on(step) >> later & 1
            for later in range(other + 1, place)
        ):
            super()._want(other, step, place)


class _SleepsForEver(Exhaustive):
    """A sleep set that no dependent step empties."""

    def _still_asleep(self, is_within_step: bool) -> Asleep:
        return self._path[-1].asleep | self._path[-1].explored if self._path else {}


class _NobodyComesBetween(Exhaustive):
    """Where a step goes on in one of several ways, only what could come right there is thought of."""

    def _whole_steps(self) -> tuple[Causality, list[int]]:
        parts = Causality()
        for step in self._run:
            parts.add(step)
        return parts, list(range(len(self._run)))


class _AWayStandsForAll(Exhaustive):
    """Asleep is what a step touched the way it went on last."""

    def took(self, step: Option) -> None:
        super().took(step)
        place = len(self._run) - 1
        for part in self._path[self._begin_of(place) : place + 1] if place >= 0 else ():
            ways = [way for way in part.explored if way[0] == part.taken]
            for way in ways[:-1]:
                part.explored[way] = part.explored[ways[-1]]


class _NeverSleeps(Exhaustive):
    def _still_asleep(self, is_within_step: bool) -> Asleep:
        return {}


class _FirstRunOnly(Exhaustive):
    """Conflicts are taken from one run: words that only a bad schedule touches are not known yet."""

    def _seek_races(self) -> None:
        if self.traces == 1:
            super()._seek_races()


MISTAKES = (
    *(
        _WantsNothing,
        _AdjacentOnly,
        _SleepsForEver,
        _NobodyComesBetween,
        _AWayStandsForAll,
        _NeverSleeps,
        _FirstRunOnly,
    ),
)


@pytest.mark.parametrize("search", MISTAKES)
def test_a_mistake_in_the_search_is_found(search: Callable[[], Exhaustive]) -> None:
    assert any(complaint(program, search()) for program, _ in PROGRAMS.values())


def test_a_search_under_way_says_what_is_left() -> None:
    program, _ = PROGRAMS["writers of one word: n!"]
    search = Exhaustive()
    next(every_schedule(program, search))
    search.ended(False)
    assert search.summary() == "1 interleavings, 0 pruned, at least 2 left"


def test_runs_that_a_failure_ended_are_told() -> None:
    """Of store buffering's three, the one where both load what the other stored."""
    program, traces = PROGRAMS["store buffering"]
    search = Exhaustive()

    def both_saw_it(machine: ToyMachine) -> bool:
        return {("A", "y", 1), ("B", "x", 1)} <= set(machine.seen)

    failed = [run for run in every_schedule(program, search, both_saw_it) if run.failed]
    assert len(failed) == search.failed == 1
    assert search.summary().startswith(f"all {traces} inequivalent interleavings, ")
    assert search.summary().endswith(", 1 ended by a failure")


def test_a_run_that_is_cut_within_a_step_may_have_touched_anything_there() -> None:
    """One way to go on stores what the other process stores, and nobody is told, as the run ends there."""
    search = Exhaustive()
    step, other = (
        Option(name, f"store {place}", frozenset({Touch(place, True)})) for name, place in ("Ax", "By")
    )
    ways = [Option("A/way", way) for way in ("one", "other")]
    assert search.choose([step, other]) == 0
    search.took(step)
    assert search.choose(ways) == 0
    assert search.ended(False)
    assert search.choose([step, other]) == 0
    search.took(step)
    assert search.choose(ways) == 1
    search.took(ways[1])
    search.took(other)
    assert search.ended(False)
    assert search.choose([step, other]) == 1
    search.took(other)
    search.took(step)
    assert search.choose(ways) == 0, "nothing is known of it that lets it sleep"


def test_a_run_that_ends_before_it_comes_to_where_it_was_to_differ_is_refused() -> None:
    search = Exhaustive()
    one, other = (Option(name, "store x", frozenset({Touch("x", True)})) for name in "AB")
    for _ in "AB":
        assert search.choose([one, other]) == 0
        search.took(one)
    assert search.ended(False)
    with pytest.raises(UnrepeatableError, match="0 steps"):
        search.ended(False)


def test_a_run_that_does_not_repeat_is_refused() -> None:
    search = Exhaustive()
    one, other = (Option(name, "store x", frozenset({Touch("x", True)})) for name in "AB")
    assert search.choose([one, other]) == 0
    search.took(one)
    search.took(other)
    assert search.ended(False)
    with pytest.raises(UnrepeatableError, match="step 0"):
        search.choose([one, Option("C", "store x")])


def test_a_scheduler_that_keeps_a_touch_to_itself_is_found_out() -> None:
    """A delivery wakes the process, and neither says that it touches its state."""
    send, other = Option("A", "send c"), Option("B", "load x", frozenset({Touch("x", False)}))
    search = Exhaustive()
    assert search.choose([send, other]) == 0
    search.took(send)
    assert search.choose([other, Option("c", "deliver")]) == 0
    search.took(other)
    search.took(Option("c", "deliver"))
    with pytest.raises(HiddenDependenceError, match=r"'send c'\) enabled .*'deliver'"):
        search.ended(False)


def test_a_process_is_not_on_offer_beside_a_delivery_to_it() -> None:
    with pytest.raises(HiddenDependenceError, match="kvmd has a step to take"):
        Exhaustive().choose([Option("kvmd", "store"), Option("kvmd<mm", "deliver")])


def test_a_timer_is_not_on_offer_beside_anything() -> None:
    """Or whether it comes first is decided by the time that steps take, which no touch tells of."""
    with pytest.raises(HiddenDependenceError, match="kvmd<timer is on offer beside"):
        Exhaustive().choose([Option("kvmd<timer", "time is up"), Option("iommufdd", "store")])


def test_what_was_on_offer_to_the_end_could_have_come_before() -> None:
    """A fault that is not injected by default: it conflicts with the step it would have preceded."""
    store = Option("A", "store x", frozenset({Touch("x", True)}))
    fault = Option("kill", "A", frozenset({Touch("x", True)}))
    search = Exhaustive()
    assert search.choose([store, fault]) == 0
    search.took(store)
    assert search.ended(False)
    assert search.choose([store, fault]) == 1
