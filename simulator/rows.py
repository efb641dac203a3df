"""What schedules with nothing planted came to: a row for what is played, and of which sources.

The record is a JSON file, a line a row:

    {"rows": [{"name", "design", "strategy", "faults": kinds, "a,b" or "", "whole": a scenario or workload,
               not a small story?, "code": of which sources (version.py), "seeds": [first, behind the last]
               of the strategy, "schedules": that were played, "faulted": in how many of them a fault
               struck, "traces": how many of them differ (older rows do not say either), "failed",
               "repeats": of the first of these, a line each that repeats it, "errors": of each shard that
               an error of ours ended, whose schedules are not counted, a line (older rows have none),
               "least": by which traces that come again are known (search/distinct.py)}]}

A run of the same sources adds to a row, of any others it begins one; either has seeds that nobody had before.
Rows of other sources are never added to, so their "least" is left out.  A seed that was begun in a sitting
that was interrupted is counted with the schedules that it had; one that was not begun may lie between others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from traceback import format_exception_only
from typing import Any, NamedTuple

from qemu_shim.study.campaign.store import write_whole
from simulator.search.distinct import Distinct

REPEATS_KEPT = 10


class Play(NamedTuple):
    """What is played, on which design, under which schedules."""

    name: str
    design: str
    strategy: str
    faults: str = ""
    whole: bool = False


@dataclass(slots=True)
class CleanRow:
    play: Play
    code: str
    first: int  # seed
    behind: int = 0  # the last seed
    schedules: int = 0
    faulted: int = 0
    failed: int = 0
    repeats: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    traces: Distinct = field(default_factory=Distinct)

    def add(
        self, seed: int, schedules: int, traces: Iterable[int], repeats: list[str], faulted: int = 0
    ) -> None:
        self._begun(seed)
        self.schedules += schedules
        self.faulted += faulted
        self.traces.add(traces)
        self.failed += len(repeats)
        self.repeats = (self.repeats + repeats)[:REPEATS_KEPT]

    def broke(self, seed: int, error: Exception) -> None:
        """By a fault of ours: nobody knows how many schedules its shard had."""
        self._begun(seed)
        what = "".join(format_exception_only(error)).partition("\n")[0]
        self.errors.append(f"seed {seed}: {what}")

    def _begun(self, seed: int) -> None:
        """Shards end in any order."""
        self.first = min(self.first, seed)
        self.behind = max(self.behind, seed + 1)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.play._asdict(),
            "code": self.code,
            "seeds": [self.first, self.behind],
            "schedules": self.schedules,
            "faulted": self.faulted,
            "traces": min(self.traces.count, self.schedules),
            "failed": self.failed,
            "repeats": self.repeats,
            "errors": self.errors,
            "least": self.traces.to_text(),
        }


def _row(kept: Mapping[str, Any]) -> CleanRow:
    first, behind = kept["seeds"]
    traces = Distinct.from_text(kept["least"])
    counts = kept["schedules"], kept.get("faulted", 0), kept["failed"]
    told = list(kept["repeats"]), list(kept.get("errors", ()))
    return CleanRow(_play(kept), kept["code"], first, behind, *counts, *told, traces)


def _play(kept: Mapping[str, Any]) -> Play:
    return Play(*(kept[name] for name in Play._fields))


class Rows:
    """Of these sources, and beside them those of others, in a file."""

    def __init__(self, path: Path, code: str) -> None:
        self._path = path
        self.code = code
        self._closed: list[dict[str, Any]] = []
        self.open: dict[Play, CleanRow] = {}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
            if row["code"] == code and "least" in row:
                self.open[_play(row)] = _row(row)
            else:
                self._closed.append({name: row[name] for name in row if name != "least"})

    def fresh(self, play: Play) -> int:
        """The first seed that nobody had."""
        behind: list[int] = [row["seeds"][1] for row in self._closed if _play(row) == play]
        behind += [row.behind for row in self.open.values() if row.play == play]
        return max(behind, default=0)

    def schedules(self, play: Play) -> int:
        """Of these sources."""
        return self.open[play].schedules if play in self.open else 0

    @property
    def errors(self) -> list[str]:
        """Of shards of these sources, whenever they were played."""
        return [
            f"{row.play.name} on {row.play.design}, {line}"
            for row in self.open.values()
            for line in row.errors
        ]

    def drop(self, play: Play) -> None:
        """Of all sources."""
        self._closed = [row for row in self._closed if _play(row) != play]
        self.open.pop(play, None)

    def of(self, play: Play, seed: int) -> CleanRow:
        """To add to; `seed`: from which on, if there is none yet."""
        return self.open.setdefault(play, CleanRow(play, self.code, seed))

    def write(self) -> None:
        rows = [*self._closed, *(row.as_json() for row in self.open.values())]
        rows.sort(key=lambda row: (_play(row), row["seeds"]))
        lines = ",\n".join(map(json.dumps, rows))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, f'{{"rows": [\n{lines}\n]}}\n'.encode())
