"""Recorded cases: files of the three forms, read into one.

A list is the form of memslots.json, an object with `sequences` that of the other two; what a case starts from
follows from the form (data/README.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Body = dict[str, Any]  # a step as recorded

NOT_FOR_TDP = ("shadow_only", "vendor")


class BadFile(Exception):
    """The file cannot be read, or is of none of the three forms."""


class BadCase(Exception):
    """One entry of a file is not a case: it fails, the others run."""


@dataclass(frozen=True, slots=True)
class Case:
    """`with_control_slot`: slot 0 is there before the first step, otherwise host memory only."""

    file: str
    name: str
    steps: tuple[Body, ...]
    with_control_slot: bool
    cpl: int = 3
    manual: int | None = None
    ring: int | None = None
    skip: str = ""  # the mark that makes it not carry over
    bad: str = ""  # why it is no case

    @property
    def id(self) -> str:
        return f"{Path(self.file).name}:{self.name}"


def load(path: Path) -> list[Case]:
    """Raises BadFile."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadFile(f"{path}: not JSON: {error}") from None
    sequences = found.get("sequences") if isinstance(found, dict) else None
    entries = found if isinstance(found, list) else sequences
    if not isinstance(entries, list):
        raise BadFile(f"{path}: neither a list of cases nor an object with `sequences`")
    return [_case(path, index, entry, sequences is not None) for index, entry in enumerate(entries)]


def _case(path: Path, index: int, entry: Any, with_control_slot: bool) -> Case:
    name = entry.get("name") if isinstance(entry, dict) else None
    named = name if isinstance(name, str) else f"case {index}"
    try:
        return _checked(path, named, entry, with_control_slot)
    except BadCase as error:
        return Case(str(path), named, (), with_control_slot, bad=str(error))


def _checked(path: Path, name: str, entry: Any, with_control_slot: bool) -> Case:
    """Raises BadCase."""
    if not isinstance(entry, dict) or entry.get("name") != name:
        raise BadCase("not an object with a name")
    steps = entry.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BadCase("`steps` is not a list of objects")
    guest = entry.get("guest") or {}
    if not isinstance(guest, dict):
        raise BadCase("`guest` is not an object")
    for key in ("manual", "ring"):
        if not isinstance(entry.get(key), int | None):
            raise BadCase(f"`{key}` is neither a number nor null")
    return Case(
        file=str(path),
        name=name,
        steps=tuple(steps),
        with_control_slot=with_control_slot,
        cpl=guest.get("cpl", 3),
        manual=entry.get("manual"),
        ring=entry.get("ring"),
        skip=mark_of(entry),
    )


def mark_of(entry: Body) -> str:
    """The mark of a case, or of a step, that says nothing about a TDP host."""
    return next((mark for mark in NOT_FOR_TDP if entry.get(mark)), "")
