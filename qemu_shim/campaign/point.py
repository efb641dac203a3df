"""A point: one workload on one design with one seed and one set of parameters; and its run as a document.

A point says all that a run depends on, parameters with their defaults, so its key names the run on every
machine.  A point that could not be run to its end has a run all the same, with what went wrong in `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qemu_shim.compare.run import SEED_MAX, Refusal, Run, Sample
from qemu_shim.designs import DESIGNS
from qemu_shim.workloads.library import WORKLOADS


@dataclass(frozen=True, slots=True)
class Point:
    """Made by `of`; `params` are sorted by name."""

    workload: str
    design: str
    seed: int
    params: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, workload: str, design: str, seed: int, params: Mapping[str, int] | None = None) -> Point:
        """LookupError: no such workload, design or parameter; ValueError: a parameter out of its bounds."""
        for what, name, known in (("workload", workload, WORKLOADS), ("design", design, DESIGNS)):
            if name not in known:
                raise LookupError(f"there is no {what} {name!r}, only {', '.join(known)}")
        if not 0 <= seed <= SEED_MAX:
            raise ValueError(f"seed {seed} is not in 0..{SEED_MAX}")
        complete = WORKLOADS[workload].with_defaults(params or {})
        return cls(workload, design, seed, tuple(sorted(complete.items())))

    @property
    def key(self) -> str:
        params = ",".join(f"{name}={value}" for name, value in self.params)
        return f"{self.workload}/{self.design}/{self.seed}/{params}"

    def failed(self, problem: str) -> Run:
        """What stands for the run of a point that came to no end."""
        return Run(self.workload, self.design, self.seed, dict(self.params), problems=[problem])


def point_of(run: Run) -> Point:
    return Point(run.workload, run.design, run.seed, tuple(sorted(run.params.items())))


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
    return {**asdict(point), "params": dict(point.params)}


def point_from(document: Mapping[str, Any]) -> Point:
    """As it was written, also where this version of the project would not make such a point."""
    return Point(**{**document, "params": tuple(sorted(document["params"].items()))})
