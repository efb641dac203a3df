"""The runs of a campaign on disk: what has been run is never run again, whatever became of the campaign.

A directory with `campaign.json`, what is to be run and by which code, and `runs.jsonl`, a line a finished
point, in the order they ended.  A line is on the disk before the next point is begun in its place; one that a
crash tore is cut off at the next start, and its point run again.  Whoever has the store open holds a lock on
the directory that goes with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.point import (
    Point,
    line_of,
    point_as_json,
    point_from,
    point_of,
    run_as_json,
    run_of,
)

FORMAT = 2  # of both files
CAMPAIGN_FILE, RUNS = "campaign.json", "runs.jsonl"


class StoreRefused(Exception):
    """The directory is not, or not now, a store for this campaign; the message says why and what to do."""


class Store:
    """`points` None: those that the store was made for.  Raises StoreRefused, and OSError."""

    def __init__(self, directory: Path, points: Sequence[Point] | None, code: str) -> None:
        self.directory = directory
        if points is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(directory)
        try:
            self.points = _header(directory, points, code)
            self._file = os.open(directory / RUNS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self.runs = _read(self._file, directory / RUNS, set(self.points))
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def add(self, run: Run) -> None:
        """On the disk when this returns.  A point's later run takes the place of the earlier."""
        line = line_of(run_as_json(run))
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"{self.directory / RUNS}: no room for a run")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise
        self.runs[point_of(run)] = run

    def missing(self, *, retry_failed: bool = False) -> list[Point]:
        return [
            point
            for point in self.points
            if (run := self.runs.get(point)) is None or (retry_failed and run.problems)
        ]


def planned(directory: Path) -> list[Point]:
    """The points that the store was made for; none, if it cannot be read: opening it says why."""
    try:
        return [point_from(point) for point in json.loads((directory / CAMPAIGN_FILE).read_bytes())["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _locked(directory: Path) -> int:
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreRefused(f"{directory} is no directory") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreRefused(f"{directory}: another campaign is at work on it") from None
    return lock


def _header(directory: Path, points: Sequence[Point] | None, code: str) -> list[Point]:
    """Read and compared, or written."""
    path = directory / CAMPAIGN_FILE
    if not path.exists():
        if points is None or (directory / RUNS).exists():
            raise StoreRefused(f"{directory} holds no campaign: there is no {CAMPAIGN_FILE} in it")
        header = {"format": FORMAT, "code": code, "points": [point_as_json(point) for point in points]}
        write_whole(path, line_of(header))
        return list(points)
    try:
        found = json.loads(path.read_bytes())
        made_by, of_format = found["code"], found["format"]
        if of_format == FORMAT:
            there = [point_from(point) for point in found["points"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreRefused(f"{path} is damaged: {error!r}") from None
    if of_format != FORMAT:
        raise StoreRefused(f"{path} has format {of_format}, this is for format {FORMAT}: use another --out")
    if made_by != code:
        raise StoreRefused(
            f"{directory} has runs of other code ({made_by}, now {code}), which may count otherwise:"
            " use another --out, or the code it was made with"
        )
    if points is not None and set(points) != set(there):
        more, fewer = len(set(points) - set(there)), len(set(there) - set(points))
        raise StoreRefused(
            f"{directory} is of a campaign of {len(there)} other points ({more} asked for are not in it,"
            f" {fewer} of it are not asked for): use another --out, or say only --out to go on with it"
        )
    return there


def write_whole(path: Path, data: bytes) -> None:
    """There with all of `data` or not there at all, also after a crash."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _read(file: int, path: Path, known: set[Point]) -> dict[Point, Run]:
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(0)
        data = reader.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.ftruncate(file, whole)
    runs: dict[Point, Run] = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            run = run_of(_object(line))
            point = point_of(run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreRefused(f"{path}, line {number} is damaged: {error!r}") from None
        if point not in known:
            raise StoreRefused(f"{path}, line {number}: {point.key} is not of this campaign")
        runs[point] = run
    return runs


def _object(line: bytes) -> dict[str, Any]:
    document = json.loads(line)
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return document
