"""The kinds of contender that figures are made of.

`CRival` is built from `rivals/` with the system's C compiler, in a directory that goes when the run
ends.  `Program` is any command that prints {"p50": ns, "p99": ns}, and may add "parts".  `Loop` times
a Python callable in this process.  `Given` is a limit that is simply stated.  `InParts` makes
one contender for each thing that a participant times in one run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Bench, Contender, NotMeasuredError, Sample, Unit
from bench.timing import percentiles, time_each

RIVALS = Path(__file__).parent / "rivals"
PROGRAM_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class CRival:
    """`source` in `rivals/`, told only how many round trips to time."""

    name: str
    source: str
    unit: Unit = Unit.NS
    pinned: bool = True

    def prepare(self, bench: Bench) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise NotMeasuredError("no C compiler: `cc` is not in PATH")
        flags = ["-O2", "-Wall", "-Wextra"]
        argv = [compiler, *flags, "-o", str(self._binary(bench)), str(RIVALS / self.source)]
        built = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PROGRAM_S_MAX)
        if built.returncode != 0:
            raise NotMeasuredError(f"cc cannot build {self.source}: {_last_line(built.stderr)}")

    def measure(self, bench: Bench) -> Sample:
        return sample_of([str(self._binary(bench)), str(bench.samples)])

    def _binary(self, bench: Bench) -> Path:
        return (bench.scratch / self.source).with_suffix("")


@dataclass(frozen=True, slots=True)
class Program:
    """`python -m module *args`; a missing one of the packages it `needs` leaves it out of the run."""

    name: str
    module: str
    args: Callable[[Bench], tuple[str, ...]]
    needs: tuple[str, ...] = ()
    unit: Unit = Unit.NS
    pinned: bool = True

    def prepare(self, bench: Bench) -> None:
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                raise NotMeasuredError(f"the package {package!r} is not installed")

    def measure(self, bench: Bench) -> Sample:
        return sample_of([sys.executable, "-m", self.module, *self.args(bench)])


@dataclass(frozen=True, slots=True)
class Loop:
    """`setup()` once per round gives the callable to time; one call of it does the thing `each` times."""

    name: str
    setup: Callable[[], Callable[[], object]]
    count: Callable[[Bench], int]
    batch: int = 1
    each: int = 1
    unit: Unit = Unit.NS
    pinned: bool = True

    def prepare(self, bench: Bench) -> None:
        pass

    def measure(self, bench: Bench) -> Sample:
        p50, p99 = percentiles(time_each(self.setup(), self.count(bench) // self.each, self.batch))
        return Sample(p50 / self.each, p99 / self.each)


class InParts:
    """A participant that times several things in one run: `part(name)` is the contender for one of them,
    whose p99 is its p50.  A round runs it once, for whichever part is asked first."""

    def __init__(self, participant: Contender) -> None:
        self.participant = participant
        self._left: dict[str, float] = {}

    def part(self, name: str) -> Part:
        return Part(f"{self.participant.name}: {name}", self, name)

    def take(self, part: str, bench: Bench) -> Sample:
        if part not in self._left:
            self._left = dict(self.participant.measure(bench).parts)
        cost = self._left.pop(part)
        return Sample(cost, cost)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    whole: InParts
    part: str

    @property
    def unit(self) -> Unit:
        return self.whole.participant.unit

    @property
    def pinned(self) -> bool:
        return self.whole.participant.pinned

    def prepare(self, bench: Bench) -> None:
        self.whole.participant.prepare(bench)

    def measure(self, bench: Bench) -> Sample:
        return self.whole.take(self.part, bench)


@dataclass(frozen=True, slots=True)
class Given:
    """A limit that nothing measures."""

    name: str
    value: float
    unit: Unit = Unit.NS
    pinned: bool = False

    def prepare(self, bench: Bench) -> None:
        pass

    def measure(self, bench: Bench) -> Sample:
        return Sample(self.value, self.value)


def sample_of(argv: list[str]) -> Sample:
    """Run a participant to its end and read its report."""
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PROGRAM_S_MAX)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"no answer within {PROGRAM_S_MAX:g} s") from None
    if ran.returncode != 0:
        raise NotMeasuredError(f"exit status {ran.returncode}: {_last_line(ran.stderr)}")
    told = json.loads(ran.stdout)
    return Sample(float(told["p50"]), float(told["p99"]), told.get("parts", {}))


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no message"
