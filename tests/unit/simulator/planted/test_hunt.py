"""A hunt: each plant by each strategy, what was found is kept, and said in a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from simulator.planted.hunt import (
    Catch,
    Hunted,
    RangeEnd,
    Record,
    Sought,
    hunt,
    hunted,
    seed_of,
    table,
)
from simulator.planted.registry import PLANTED

ONE, TWO = (PLANTED[name] for name in ("R4-acks-not-awaited", "R2-sequence-of-32-bits"))
WANTED = [
    Sought(plant.id, strategy, number)
    for plant in (ONE, TWO)
    for strategy, ranges in (("random", 3), ("pct", 2))
    for number in range(ranges)
]
MOST = 100


def caught(schedules: int, invariant: str = "I6", steps: int | None = 5) -> Catch:
    return Catch(invariant, schedules, steps, "migrate", "shared")


def end(catch: Catch | None, code: str = "v1", most: int = MOST) -> RangeEnd:
    return RangeEnd(catch, most, 1.5, code)


class Seeker:
    """Catches ONE at once, TWO never; `asked` is what it was asked."""

    def __init__(self, until: int = 1000, code: str = "v1", most: int = MOST) -> None:
        self.asked: list[Sought] = []
        self._until, self._code, self._most = until, code, most

    def __call__(self, tasks: Iterable[Sought]) -> Iterator[tuple[Sought, RangeEnd]]:
        for task in tasks:
            if len(self.asked) == self._until:
                raise KeyboardInterrupt
            self.asked.append(task)
            found = caught(1 + task.number) if task.plant == ONE.id else None
            yield task, end(found, self._code, self._most)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "build" / "found.json")


def test_each_that_is_sought_is_put_on_record(record: Record) -> None:
    told = list(hunt(WANTED, Seeker(), record, MOST))
    assert [sought for sought, _ in told] == WANTED
    assert record.read() == dict(told)


def test_it_goes_on_where_it_was_stopped(record: Record) -> None:
    stopped, going_on = Seeker(until=4), Seeker()
    with pytest.raises(KeyboardInterrupt):
        list(hunt(WANTED, stopped, record, MOST))
    list(hunt(WANTED, going_on, record, MOST))
    assert stopped.asked + going_on.asked == WANTED


def test_what_other_sources_came_to_stays_until_it_is_sought_again(record: Record) -> None:
    list(hunt(WANTED, Seeker(), record, MOST))
    other = Seeker(code="v2")
    list(hunt(WANTED, other, record, MOST))
    assert other.asked == []
    assert {kept.code for kept in record.read().values()} == {"v1"}
    list(hunt(WANTED, other, record, MOST, lambda kept: kept.code != "v2"))
    assert other.asked == WANTED
    assert {kept.code for kept in record.read().values()} == {"v2"}


def test_what_was_not_found_is_sought_again_in_more_schedules(record: Record) -> None:
    list(hunt(WANTED, Seeker(), record, MOST))
    fewer, more = Seeker(most=MOST - 1), Seeker(most=MOST + 1)
    list(hunt(WANTED, fewer, record, MOST - 1))
    list(hunt(WANTED, more, record, MOST + 1))
    assert fewer.asked == []
    assert more.asked == [sought for sought in WANTED if sought.plant == TWO.id]


def test_results_are_of_plants_that_there_are_as_they_are_listed() -> None:
    results = {
        sought: end(None)
        for sought in (*reversed(WANTED), Sought("gone", "random", 0))
        if sought.strategy == "random"
    }
    first, second = sorted((ONE.id, TWO.id), key=list(PLANTED).index)
    assert [(it.plant.id, len(it.ends)) for it in hunted(results)] == [(first, 3), (second, 3)]


def test_each_range_has_a_seed_of_its_own() -> None:
    assert len({seed_of(number) for number in range(7)}) == 7


@pytest.mark.parametrize(
    ("finds", "schedules", "is_right"),
    [
        ([caught(1, "I6", 3), caught(9, "I6", 5), caught(2, "I6", 4)], 2, True),
        ([caught(1, "I6", 3), None, caught(2, "I6", 4)], 2, False),
        ([caught(1, "I6", 3), None, None], None, False),
        ([None], None, False),
        ([caught(1, "I25", 3)], 1, False),
    ],
    ids=["all", "most", "few", "none", "by another invariant"],
)
def test_the_median_counts_who_found_nothing(
    finds: list[Catch | None], schedules: float | None, is_right: bool
) -> None:
    result = Hunted(ONE, "random", [end(find) for find in finds])
    assert (result.schedules, result.is_right) == (schedules, is_right)


def test_how_short_a_story_can_be_is_of_those_that_were_shrunk() -> None:
    finds = [caught(1, steps=3), caught(1, steps=7), *[caught(1, steps=None)] * 7]
    assert Hunted(ONE, "mixed", [end(find) for find in finds]).steps == 5
    assert Hunted(ONE, "mixed", [end(find) for find in finds[2:]]).steps is None


def test_who_is_found_by_a_story_that_was_written_for_it_is_not_met_by_others() -> None:
    plant = PLANTED["R19-cleared-and-not-flushed"]
    by_other = Catch("I25", 1, 0, "migrate", "shared")
    written, gone = by_other._replace(story="log"), by_other._replace(story="there is none")

    def met(*catches: Catch | None) -> bool:
        return Hunted(plant, "random", [end(catch) for catch in catches]).is_met_by_others

    assert met(by_other)
    assert met(by_other, written)
    assert not met(by_other, written, gone)
    assert not met(by_other, None), "it was not found in every range"


def test_the_table_marks_what_was_not_found_as_it_should() -> None:
    text = table(
        [
            Hunted(ONE, "random", [end(caught(4, "I6", 7))]),
            Hunted(ONE, "pct", [end(caught(4, "I25", 7))]),
            Hunted(TWO, "random", [end(None)]),
        ]
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        [ONE.id, "random", "I6", "I6", "1/1", "4", "7", "2", "migrate"],
        [ONE.id, "pct", "I6", "I25", "1/1", "!", "4", "7", "2", "migrate"],
        [TWO.id, "random", "R2", "-", "0/1", "!", "-", "-", "2", "-"],
    ]
