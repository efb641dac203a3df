"""What a campaign runs: workloads by designs by seeds by every combination of parameter values, on daemons
that all have the same options.

    workloads = ["boot-touch", "my.py"]       all of them
    designs = ["mirror", "shared"]            all of them
    seeds = "0..9"                            "0"; also "1,3,10..12"
    [params]
    pages = [64, 256]                         of every workload that has it, with every other
    dmatest.buf_kib = [64, 1024]              of one
    [options]
    iommufdd = "--premap-pages 8"             none: a daemon is started as its workload wants it

is a file in TOML; what is left out is as on the right.  Options of the command line replace what it says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from qemu_shim.study.campaign.point import Point
from qemu_shim.study.workloads.library import WORKLOADS, workload_of
from qemu_shim.vmm.daemon_options import canonical
from qemu_shim.vmm.designs import DESIGNS

MAX_POINTS = 100_000


class BadPlan(Exception):
    """What was asked for cannot be run; the message names it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`params` by name, or by workload and name with a dot between; `options` by the daemon's name."""

    workloads: Sequence[str] = tuple(WORKLOADS)
    designs: Sequence[str] = tuple(DESIGNS)
    seeds: Sequence[int] = (0,)
    params: Mapping[str, Sequence[int]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """In the order they are said, each once.  BadPlan: something in it does not exist."""
        grids = [(workload, self._grid(workload)) for workload in self.workloads]
        _check_used(self.params, grids)
        each = len(self.designs) * len(self.seeds)
        count = sum(each * prod(map(len, grid.values())) for _, grid in grids)
        if count > MAX_POINTS:
            raise BadPlan(f"{count} points, at most {MAX_POINTS}")
        try:
            made = [
                Point.of(workload, design, seed, dict(zip(grid, values, strict=True)), self.options)
                for workload, grid in grids
                for values in product(*grid.values())
                for design in self._designs(workload)
                for seed in self.seeds
            ]
        except (LookupError, ValueError) as error:
            raise BadPlan(str(error)) from None
        return list(dict.fromkeys(made))

    def _designs(self, workload: str) -> list[str]:
        """Those it can be played on, and those that do not exist, for Point to say so."""
        playable = workload_of(workload).playable
        return [design for design in self.designs if design in playable or design not in DESIGNS]

    def _grid(self, workload: str) -> dict[str, Sequence[int]]:
        """The parameters of one workload, those said of it alone before those said of all."""
        try:
            has = workload_of(workload).params
        except LookupError as error:
            raise BadPlan(str(error)) from None
        of_all = {name: values for name, values in self.params.items() if name in has}
        own = f"{workload}."
        of_it = {name.removeprefix(own): v for name, v in self.params.items() if name.startswith(own)}
        return of_all | of_it


def _check_used(params: Mapping[str, object], grids: Iterable[tuple[str, Mapping[str, object]]]) -> None:
    used = {name for workload, grid in grids for key in grid for name in (key, f"{workload}.{key}")}
    for name in params:
        if name not in used:
            raise BadPlan(f"no workload of the campaign has a parameter {name}")


def read_plan(path: Path) -> Plan:
    """BadPlan: it is no plan, or cannot be read."""
    try:
        return plan_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadPlan(f"{path}: {error.strerror}") from None
    except (BadPlan, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadPlan(f"{path}: {error}") from None


def plan_of(document: Mapping[str, Any]) -> Plan:
    """A file's contents as a plan."""
    said: dict[str, Any] = {}
    for name, value in document.items():
        if name in ("workloads", "designs"):
            said[name] = _strings(name, value)
        elif name == "seeds":
            said[name] = numbers(value) if isinstance(value, str) else _integers(name, value)
        elif name == "params" and isinstance(value, dict):
            said[name] = dict(_params(value))
        elif name == "options" and isinstance(value, dict):
            said[name] = {daemon: _option(daemon, text) for daemon, text in value.items()}
        else:
            raise BadPlan(f"{name}: a plan has workloads, designs, seeds and tables params and options")
    return Plan(**said)


def _params(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Sequence[int]]]:
    for name, value in table.items():
        if isinstance(value, dict) and not prefix:
            yield from _params(value, f"{name}.")
        else:
            yield prefix + name, _integers(prefix + name, value)


def _option(daemon: str, text: object) -> str:
    if not isinstance(text, str):
        raise BadPlan(f"options.{daemon}: a text such as '--no-pml'")
    try:
        return canonical(daemon, text)
    except (ValueError, LookupError) as error:
        raise BadPlan(f"options.{daemon}: {error}") from None


def _strings(name: str, value: object) -> list[str]:
    if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        raise BadPlan(f"{name}: a list of names")
    return value


def _integers(name: str, value: object) -> list[int]:
    values: list[Any] = value if isinstance(value, list) else [value]
    if not (values and all(type(item) is int for item in values)):
        raise BadPlan(f"{name}: a number or a list of them")
    return values


def numbers(text: str) -> list[int]:
    """`3`, `0..9` with both ends, `1,4,6..8`.  BadPlan: none, or too many."""
    found: list[int] = []
    for piece in text.split(","):
        first, dots, last = piece.partition("..")
        try:
            low = int(first)
            high = int(last) if dots else low
        except ValueError:
            raise BadPlan(f"{text!r}: numbers such as 3 or 0..9 or 1,4,6..8") from None
        if high < low or high - low >= MAX_POINTS:
            raise BadPlan(f"{piece!r}: from low to high, at most {MAX_POINTS}")
        found += range(low, high + 1)
    return found
