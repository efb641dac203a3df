"""A point: one workload on one design with one seed, one set of parameters and one of daemon options; and its
run as a document.

A point says all that a run depends on, parameters with their defaults, so its key names the run on every
machine.  A point that could not be run to its end has a run all the same, with what went wrong in `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from qemu_shim.scenarios.run import SEED_MAX, Refusal, Run, Sample
from qemu_shim.study.workloads.library import workload_of
from qemu_shim.vmm.daemon_options import as_said, canonical
from qemu_shim.vmm.designs import DESIGNS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Point:
    """Made by `of`; `params` and `options` are sorted by name."""

    workload: str
    design: str
    seed: int
    params: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        workload: str,
        design: str,
        seed: int,
        params: Mapping[str, int] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Point:
        """LookupError: no such workload, design, parameter or daemon; ValueError: a parameter out of its
        bounds, options that are no words.
        """
        of = workload_of(workload)
        if design not in DESIGNS:
            raise LookupError(f"there is no design {design!r}, only {', '.join(DESIGNS)}")
        if design not in of.playable:
            raise LookupError(f"{workload} cannot be played on {design}, only on {', '.join(of.playable)}")
        if not 0 <= seed <= SEED_MAX:
            raise ValueError(f"seed {seed} is not in 0..{SEED_MAX}")
        complete = of.with_defaults(params or {})
        said = {name: text for name, given in (options or {}).items() if (text := canonical(name, given))}
        return cls(workload, design, seed, _sorted(complete), _sorted(said))

    @property
    def key(self) -> str:
        params = ",".join(f"{name}={value}" for name, value in self.params)
        return f"{self.workload}/{self.design}/{self.seed}/{params}{as_said(dict(self.options))}"

    def failed(self, problem: str) -> Run:
        """What stands for the run of a point that came to no end."""
        return Run(
            self.workload,
            self.design,
            self.seed,
            dict(self.params),
            problems=[problem],
            options=dict(self.options),
        )


def point_of(run: Run) -> Point:
    return Point(run.workload, run.design, run.seed, _sorted(run.params), _sorted(run.options))


def line_of(document: Any) -> bytes:
    """As one line, the same for equal documents."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def run_as_json(run: Run) -> dict[str, Any]:
    return asdict(run)


def run_of(document: Mapping[str, Any]) -> Run:
    """KeyError, TypeError: it is no run."""
    samples = [Sample(**sample) for sample in document["samples"]]
    refusals = [Refusal(**refusal) for refusal in document["refusals"]]
    return Run(**{**document, "samples": samples, "refusals": refusals})


def point_as_json(point: Point) -> dict[str, Any]:
    return {**asdict(point), "params": dict(point.params), "options": dict(point.options)}


def point_from(document: Mapping[str, Any]) -> Point:
    """As it was written, also where this version of the project would not make such a point."""
    tables = {name: _sorted(document[name]) for name in ("params", "options")}
    return Point(**{**document, **tables})


def _sorted(table: Mapping[str, T]) -> tuple[tuple[str, T], ...]:
    return tuple(sorted(table.items()))
