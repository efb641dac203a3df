"""A hunt: each plant by each strategy, with the plant in; what was found is kept, and said in a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.planted.hunt import MAX_SCHEDULES, Catch, Effort, Hunted, Record, hunt, seeds_of, table
from simulator.planted.registry import PLANTED, current
from tests.planted.plugin import Plants

ONE, TWO = (PLANTED[name] for name in ("R4-acks-not-awaited", "R2-sequence-of-32-bits"))
EFFORTS = [Effort("random", 3), Effort("pct", 2)]


class Finder:
    """Finds ONE at once, TWO never; `asked` is what it was asked, and what was in then."""

    def __init__(self, until: int = 1000) -> None:
        self.asked: list[tuple[str, str, int, str | None]] = []
        self._until = until

    def __call__(self, plant: object, strategy: str, seeds: range) -> Catch | None:
        if len(self.asked) == self._until:
            raise KeyboardInterrupt
        name = ONE.id if plant is ONE else TWO.id
        self.asked.append((name, strategy, seeds.start, current()))
        return Catch("I6", 1 + seeds.start // MAX_SCHEDULES, 5) if plant is ONE else None


@pytest.fixture
def record(tmp_path: Path, plant: Plants) -> Record:
    return Record(tmp_path / "build" / "found.json", "v1")


def test_each_plant_by_each_strategy_with_itself_in(record: Record) -> None:
    finder = Finder()
    results = list(hunt([ONE, TWO], EFFORTS, finder, record))
    assert [(result.plant, result.strategy) for result in results] == [
        (ONE, "random"),
        (ONE, "pct"),
        (TWO, "random"),
        (TWO, "pct"),
    ]
    assert all(name == on for name, _, _, on in finder.asked)
    assert [start for name, strategy, start, _ in finder.asked if (name, strategy) == (ONE.id, "random")] == [
        0,
        MAX_SCHEDULES,
        2 * MAX_SCHEDULES,
    ]
    assert current() is None


def test_it_goes_on_where_it_was_stopped(record: Record) -> None:
    stopped = Finder(until=4)
    with pytest.raises(KeyboardInterrupt):
        list(hunt([ONE, TWO], EFFORTS, stopped, record))
    going_on, whole = Finder(), Finder()
    results = list(hunt([ONE, TWO], EFFORTS, going_on, record))
    assert len(stopped.asked) + len(going_on.asked) == 2 * (3 + 2)
    anew = Record(record._path.with_name("other.json"), "v1")
    assert [r.finds for r in results] == [r.finds for r in hunt([ONE, TWO], EFFORTS, whole, anew)]
    assert stopped.asked + going_on.asked == whole.asked


def test_what_other_code_found_is_sought_again(record: Record) -> None:
    list(hunt([ONE], EFFORTS, Finder(), record))
    again = Finder()
    list(hunt([ONE], EFFORTS, again, Record(record._path, "v2")))
    assert len(again.asked) == 5


def test_ranges_of_seeds_have_none_in_common() -> None:
    assert seeds_of(0).stop == seeds_of(1).start
    assert len(seeds_of(7)) == MAX_SCHEDULES


@pytest.mark.parametrize(
    ("finds", "schedules", "is_right"),
    [
        ([Catch("I6", 1, 3), Catch("I6", 9, 5), Catch("I6", 2, 4)], 2, True),
        ([Catch("I6", 1, 3), None, Catch("I6", 2, 4)], 2, False),
        ([Catch("I6", 1, 3), None, None], None, False),
        ([None], None, False),
        ([Catch("I25", 1, 3)], 1, False),
    ],
    ids=["all", "most", "few", "none", "by another invariant"],
)
def test_the_median_counts_who_found_nothing(
    finds: list[Catch | None], schedules: float | None, is_right: bool
) -> None:
    result = Hunted(ONE, "random", finds, 1.0)
    assert (result.schedules, result.is_right) == (schedules, is_right)


def test_the_table_marks_what_was_not_found_as_it_should() -> None:
    text = table(
        [
            Hunted(ONE, "random", [Catch("I6", 4, 7)], 2.0),
            Hunted(ONE, "pct", [Catch("I25", 4, 7)], 2.0),
            Hunted(TWO, "random", [None], 60.0),
        ]
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        [ONE.id, "random", "I6", "I6", "1/1", "4", "7", "2"],
        [ONE.id, "pct", "I6", "I25", "1/1", "!", "4", "7", "2"],
        [TWO.id, "random", "R2", "-", "0/1", "!", "-", "-", "60"],
    ]
