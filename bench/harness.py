"""Runs contenders side by side and holds each figure against its limit.

A *contender* costs something: nanoseconds, bytes.  A *figure* has rows; a row names two contenders,
ours and a rival or limit, and the ratio we want between them.  No absolute cost is a target: the
machine decides the microseconds, the software decides the ratio.

1. Rounds are interleaved: each runs every contender once, in an order shuffled under a fixed seed, so
   that a slow minute of the host falls on both sides of a ratio.
2. A row's ratio is taken within each round; the median over rounds is what is judged.
3. Whatever keeps a contender from running makes its rows 'not measured', which is not a pass.
4. A pinned contender whose core was taken by others is run again, and the calmest run counts.
"""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Protocol

from bench.timing import pinned

SEED = 1
FOREIGN_MAX = 0.15
TRIES_MAX = 3


class Unit(Enum):
    NS = "ns"
    BYTES = "bytes"


class NotMeasuredError(Exception):
    """A contender cannot run here; the message is the row's reason."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender in one round: two percentiles of its cost and, if it knows, where p50 goes."""

    p50: float
    p99: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a contender is given: a directory that lives as long as the run, and how much to do."""

    scratch: Path
    rounds: int
    samples: int


class Contender(Protocol):
    """One way of doing one thing.  `pinned` contenders run on one core with all their processes."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def pinned(self) -> bool: ...
    def prepare(self, bench: Bench) -> None:
        """Once, before the first round: build, import, or raise NotMeasuredError."""

    def measure(self, bench: Bench) -> Sample:
        """Once per round.  About `bench.samples` round trips of 10 us, fewer if each takes longer."""


@dataclass(frozen=True, slots=True)
class AtMost:
    """Ours costs at most `ratio` times the limit."""

    ratio: float

    def of(self, ours: float, limit: float) -> float:
        return ours / limit

    def holds(self, ratio: float) -> bool:
        return ratio <= self.ratio

    def __str__(self) -> str:
        return f"<= {self.ratio:g}"


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The rival costs at least `ratio` times what ours does: ours is that many times faster."""

    ratio: float

    def of(self, ours: float, limit: float) -> float:
        return limit / ours

    def holds(self, ratio: float) -> bool:
        return ratio >= self.ratio

    def __str__(self) -> str:
        return f">= {self.ratio:g}"


@dataclass(frozen=True, slots=True)
class Shown:
    """A ratio between rivals: printed so that the rows can be read, judged by nobody."""

    def of(self, ours: float, limit: float) -> float:
        return ours / limit

    def holds(self, ratio: float) -> bool:
        return True

    def __str__(self) -> str:
        return "-"


@dataclass(frozen=True, slots=True)
class Row:
    ours: Contender
    limit: Contender
    wanted: AtMost | AtLeast | Shown


@dataclass(frozen=True, slots=True)
class Figure:
    """`name` selects it on the command line, `title` says what is measured."""

    name: str
    title: str
    rows: tuple[Row, ...]


class Verdict(Enum):
    OK = "ok"
    MISSED = "MISSED"
    SHOWN = "shown"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Result:
    """One row after the run; `ratios` has one entry per round and is empty if it was not measured."""

    figure: Figure
    row: Row
    verdict: Verdict
    ratios: tuple[float, ...] = ()
    why: str = ""

    @property
    def ratio(self) -> float:
        return median(self.ratios)


@dataclass(slots=True)
class Run:
    """Everything measured: samples by contender name, one per round, and the reasons for gaps."""

    bench: Bench
    core: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)

    def typical(self, contender: Contender) -> Sample:
        """The median over rounds of each percentile and part."""
        samples = self.samples[contender.name]
        return Sample(
            median(sample.p50 for sample in samples),
            median(sample.p99 for sample in samples),
            {part: median(sample.parts[part] for sample in samples) for part in samples[0].parts},
        )


def run(figures: Iterable[Figure], bench: Bench) -> tuple[Run, list[Result]]:
    figures = tuple(figures)
    # The last core: interrupts mostly land on the first.
    this = Run(bench, core=max(os.sched_getaffinity(0)))
    contenders = _contenders_of(figures)
    for contender in contenders:
        try:
            contender.prepare(bench)
        except NotMeasuredError as error:
            this.missing[contender.name] = str(error)
    order = random.Random(SEED)
    for _ in range(bench.rounds):
        order.shuffle(contenders)
        for contender in contenders:
            if contender.name not in this.missing:
                _measure(this, contender)
    return this, [_judge(this, figure, row) for figure in figures for row in figure.rows]


def _contenders_of(figures: Iterable[Figure]) -> list[Contender]:
    """Each contender once, though several rows share it: a round measures it once for all of them."""
    found: dict[str, Contender] = {}
    for figure in figures:
        for row in figure.rows:
            for contender in (row.ours, row.limit):
                other = found.setdefault(contender.name, contender)
                assert other == contender, f"two contenders are called {contender.name!r}"
    return list(found.values())


def _measure(this: Run, contender: Contender) -> None:
    calmest: tuple[float, Sample] | None = None
    for _ in range(TRIES_MAX):
        where: AbstractContextManager[None] = pinned(this.core) if contender.pinned else nullcontext()
        try:
            with where:
                before = _core_use(this.core)
                sample = contender.measure(this.bench)
                foreign = _foreign_share(before, _core_use(this.core)) if contender.pinned else 0.0
        except NotMeasuredError as error:
            this.missing[contender.name] = str(error)
            return
        if calmest is None or foreign < calmest[0]:
            calmest = foreign, sample
        if foreign <= FOREIGN_MAX:
            break
    assert calmest is not None, "at least one try"
    this.foreign.append(calmest[0])
    this.samples.setdefault(contender.name, []).append(calmest[1])


def _judge(this: Run, figure: Figure, row: Row) -> Result:
    for contender in (row.ours, row.limit):
        if contender.name in this.missing:
            why = f"{contender.name}: {this.missing[contender.name]}"
            return Result(figure, row, Verdict.NOT_MEASURED, why=why)
    pairs = zip(this.samples[row.ours.name], this.samples[row.limit.name], strict=True)
    ratios = tuple(row.wanted.of(ours.p50, limit.p50) for ours, limit in pairs)
    if isinstance(row.wanted, Shown):
        verdict = Verdict.SHOWN
    else:
        verdict = Verdict.OK if row.wanted.holds(median(ratios)) else Verdict.MISSED
    return Result(figure, row, verdict, ratios)


@dataclass(frozen=True, slots=True)
class _CoreUse:
    """Seconds: now, the core busy since boot (stolen time too), and used by us and our children."""

    now: float
    busy: float
    own: float


def _core_use(core: int) -> _CoreUse:
    with open("/proc/stat", encoding="ascii") as stat:
        line = next(line for line in stat if line.startswith(f"cpu{core} "))
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in line.split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return _CoreUse(monotonic(), busy, sum(one.ru_utime + one.ru_stime for one in used))


def _foreign_share(before: _CoreUse, after: _CoreUse) -> float:
    """Of the time between, how much the core worked for others; participants must have been reaped."""
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, foreign / (after.now - before.now))
