"""How soon the simulator finds each planted bug: every plant by every strategy over several ranges of seeds.

What finds is handed in (`Find`).  Each result is put on record before the next is sought, so that a hunt can
be stopped and goes on where it was; a record of another version of the code is begun anew.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from simulator.planted.belongs import invariants_of
from simulator.planted.plant import Plant
from simulator.planted.registry import planted

MAX_SCHEDULES = 20_000  # of one range of seeds: who is not found by then is not found


class Catch(NamedTuple):
    """Which invariant broke, after how many schedules, and the steps of the story it was shrunk to."""

    invariant: str
    schedules: int
    steps: int


Find = Callable[[Plant, str, range], Catch | None]
"""With the plant in: seeds of the range are tried by the strategy of that name until something breaks."""


class Effort(NamedTuple):
    """How many ranges of seeds a strategy gets."""

    strategy: str
    ranges: int


@dataclass(frozen=True, slots=True)
class Hunted:
    """Of one plant by one strategy; None: a range of seeds without a find."""

    plant: Plant
    strategy: str
    finds: Sequence[Catch | None]
    seconds: float

    @property
    def found(self) -> list[Catch]:
        return [find for find in self.finds if find is not None]

    @property
    def schedules(self) -> float | None:
        """The median over all ranges; None where half of them or more found nothing."""
        counts = [float("inf") if find is None else find.schedules for find in self.finds]
        middle = median(counts)
        return None if middle == float("inf") else middle

    @property
    def steps(self) -> float | None:
        return median(find.steps for find in self.found) if self.found else None

    @property
    def invariants(self) -> Counter[str]:
        return Counter(find.invariant for find in self.found)

    @property
    def is_right(self) -> bool:
        """Catch in every range, each time by an invariant that it belongs to."""
        return len(self.found) == len(self.finds) and set(self.invariants) <= invariants_of(self.plant)


class Record:
    """Results by plant, strategy and range, in a file."""

    def __init__(self, path: Path, version: str) -> None:
        self._path = path
        self._version = version

    def get(self, *key: object) -> tuple[Catch | None, float] | None:
        """What was found, and the seconds it took; None: nothing is on record."""
        kept = self._read().get(_name(key))
        if kept is None:
            return None
        find, seconds = kept
        return None if find is None else Catch(*find), seconds

    def put(self, *key: object, find: Catch | None, seconds: float) -> None:
        results = self._read() | {_name(key): (find, seconds)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({"version": self._version, "results": results}), encoding="utf-8")
        os.replace(beside, self._path)

    def _read(self) -> dict[str, tuple[list[object] | Catch | None, float]]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return dict(kept["results"]) if kept["version"] == self._version else {}


def _name(key: tuple[object, ...]) -> str:
    return "/".join(map(str, key))


def hunt(plants: Iterable[Plant], efforts: Iterable[Effort], find: Find, record: Record) -> Iterator[Hunted]:
    """One result after the other, what is on record without another search."""
    efforts = list(efforts)
    for plant in plants:
        for strategy, ranges in efforts:
            finds: list[Catch | None] = []
            spent = 0.0
            for number in range(ranges):
                kept = record.get(plant.id, strategy, number)
                if kept is None:
                    began = time.monotonic()
                    with planted(plant.id):
                        made = find(plant, strategy, seeds_of(number))
                    kept = made, time.monotonic() - began
                    record.put(plant.id, strategy, number, find=made, seconds=kept[1])
                finds.append(kept[0])
                spent += kept[1]
            yield Hunted(plant, strategy, finds, spent)


def seeds_of(number: int) -> range:
    """Those of one range: no two have a seed in common."""
    return range(number * MAX_SCHEDULES, (number + 1) * MAX_SCHEDULES)


HEAD = ("plant", "strategy", "belongs to", "found by", "ranges", "schedules", "steps", "seconds")


def table(results: Iterable[Hunted]) -> str:
    """A line a result; `!`: not found in every range, or by another invariant."""
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
        f"{len(result.found)}/{len(result.finds)}{'' if result.is_right else ' !'}",
        "-" if result.schedules is None else f"{result.schedules:g}",
        "-" if result.steps is None else f"{result.steps:g}",
        f"{result.seconds:.0f}",
    )
