"""How soon the simulator finds each planted bug: every plant by every strategy over several ranges.

A range is what a strategy chooses from one seed on (`seed_of`).  What seeks is handed in (`Seek`).  What a
range came to is put on record at once, so that a hunt can be stopped and goes on where it was.  It says of
which sources it is, and stays when they change: who hunts says what is to be sought again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from qemu_shim.study.campaign.store import write_whole
from simulator.planted.belongs import invariants_of
from simulator.planted.plant import Plant
from simulator.planted.registry import PLANTED
from simulator.stories.written import is_written_for

MAX_SCHEDULES = 20_000  # of one range: who is not found by then is not found


class Catch(NamedTuple):
    """Which invariant broke, after how many schedules, the steps of the story it was shrunk to, if it was,
    and which one that is of, with which kinds of faults."""

    invariant: str
    schedules: int
    steps: int | None
    story: str
    design: str
    faults: str = ""


class Sought(NamedTuple):
    """A plant in one range, by the strategy of that name."""

    plant: str
    strategy: str
    number: int


class RangeEnd(NamedTuple):
    """None: nothing broke within `most` schedules.  `seconds` of one core; `code`: of which sources it is."""

    catch: Catch | None
    most: int
    seconds: float
    code: str

    def is_short_of(self, most: int) -> bool:
        return self.catch is None and self.most < most


Seek = Callable[[Iterable[Sought]], Iterator[tuple[Sought, RangeEnd]]]
"""In whatever order they come."""


@dataclass(frozen=True, slots=True)
class Hunted:
    """One plant by one strategy, in some ranges."""

    plant: Plant
    strategy: str
    ends: Sequence[RangeEnd]

    @property
    def found(self) -> list[Catch]:
        return [it.catch for it in self.ends if it.catch is not None]

    @property
    def seconds(self) -> float:
        return sum(it.seconds for it in self.ends)

    @property
    def schedules(self) -> float | None:
        """The median over all ranges; None where half of them or more found nothing."""
        counts = [float("inf") if it.catch is None else it.catch.schedules for it in self.ends]
        middle = median(counts)
        return None if middle == float("inf") else middle

    @property
    def steps(self) -> float | None:
        """The median of those that were shrunk."""
        shrunk = [find.steps for find in self.found if find.steps is not None]
        return median(shrunk) if shrunk else None

    @property
    def invariants(self) -> Counter[str]:
        return Counter(find.invariant for find in self.found)

    @property
    def is_right(self) -> bool:
        """Found in every range, each time by an invariant that it belongs to."""
        return len(self.found) == len(self.ends) and set(self.invariants) <= invariants_of(self.plant)

    @property
    def is_ever_right(self) -> bool:
        """Found in some range by an invariant that it belongs to."""
        return any(find.invariant in invariants_of(self.plant) for find in self.found)

    @property
    def is_met_by_others(self) -> bool:
        """Right, in half of its ranges or more by a story that was not written for it."""
        others = sum(not is_written_for(find.story, self.plant) for find in self.found)
        return self.is_right and 2 * others >= len(self.ends)

    @property
    def stories(self) -> Counter[str]:
        return Counter(
            f"{find.story}{' with faults' * bool(find.faults)}{' *' * is_written_for(find.story, self.plant)}"
            for find in self.found
        )


def hunted(results: Mapping[Sought, RangeEnd]) -> list[Hunted]:
    """Each plant that there still is by each strategy that sought it; plants as they are listed."""
    ends: dict[tuple[str, str], list[RangeEnd]] = {}
    for sought, end in sorted(results.items()):
        ends.setdefault((sought.plant, sought.strategy), []).append(end)
    places = {name: place for place, name in enumerate(PLANTED)}
    keys = sorted((key for key in ends if key[0] in PLANTED), key=lambda key: (key[1], places[key[0]]))
    return [Hunted(PLANTED[plant], strategy, ends[plant, strategy]) for plant, strategy in keys]


class Record:
    """Outcomes, in a file that one process at a time writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[Sought, RangeEnd]:
        try:
            return of_json(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def put(self, sought: Sought, end: RangeEnd) -> None:
        results = self.read() | {sought: end}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, _as_json(results).encode())


def of_json(record: Mapping[str, Any]) -> dict[Sought, RangeEnd]:
    results = {}
    for line in record["results"]:
        sought = Sought(*(line[name] for name in Sought._fields))
        end = RangeEnd(*(line[name] for name in RangeEnd._fields))
        results[sought] = end._replace(catch=end.catch and Catch(*end.catch))
    return results


def _as_json(results: Mapping[Sought, RangeEnd]) -> str:
    """A line each."""
    lines = (json.dumps(sought._asdict() | end._asdict()) for sought, end in sorted(results.items()))
    return '{"results": [\n' + ",\n".join(lines) + "\n]}\n"


def hunt(
    wanted: Iterable[Sought],
    seek: Seek,
    record: Record,
    most: int,
    again: Callable[[RangeEnd], bool] = lambda end: False,
) -> Iterator[tuple[Sought, RangeEnd]]:
    """Those that are sought: that are not on record, were not found in fewer than `most` schedules, or of
    which what is on record is to be sought `again`.
    """
    kept = record.read()
    missing = [one for one in wanted if one not in kept or kept[one].is_short_of(most) or again(kept[one])]
    for sought, end in seek(missing):
        record.put(sought, end)
        yield sought, end


def seed_of(number: int) -> int:
    """Of one range.  What is on record was sought by these."""
    return number * MAX_SCHEDULES


HEAD = ("plant", "strategy", "belongs to", "found by", "ranges", "schedules", "steps", "seconds", "stories")


def table(results: Iterable[Hunted]) -> str:
    """A line a result; `!`: not found in every range, or by another invariant; `*`: by a story that was
    written for it.
    """
    rows = [HEAD, *(_row(result) for result in results)]
    wide = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows
    )


def _row(result: Hunted) -> tuple[str, ...]:
    return (
        result.plant.id,
        result.strategy,
        result.plant.invariant,
        ", ".join(result.invariants) or "-",
        f"{len(result.found)}/{len(result.ends)}{'' if result.is_right else ' !'}",
        "-" if result.schedules is None else f"{result.schedules:g}",
        "-" if result.steps is None else f"{result.steps:g}",
        f"{result.seconds:.0f}",
        ", ".join(result.stories) or "-",
    )
