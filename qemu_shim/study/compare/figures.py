"""From runs to figures: what each design did in each workload, and what that would have cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from protocol.units import PAGE_SIZE
from qemu_shim.scenarios.run import Run, Sample
from qemu_shim.study.compare.costs import Costs, S, Values, events_of, paid
from qemu_shim.study.compare.latency import CLASSES, class_of, waits
from qemu_shim.study.compare.ranking import tiers, unranked
from qemu_shim.study.compare.schema import (
    VERSION,
    Comparison,
    CostFigure,
    DesignFigures,
    FaultFigures,
    Latency,
    PinnedFigures,
    RefusalFigure,
    Series,
    Span,
    Tables,
    Time,
    Told,
    Work,
    WorkloadFigures,
)
from qemu_shim.study.compare.sensitivity import plane, rank_changes, swept_ends, total_us
from qemu_shim.vmm.designs import DESIGNS

LEVELS = range(1, 6)
SERIES_MAX = 32
FIRST_DMA = "first dma"
SIDES = {"cpu": ("cpu",), "io": ("io",), "both": ("cpu", "io")}


@dataclass(frozen=True, slots=True)
class Step:
    """What happened between two samples, as the cost model wants it."""

    before: Sample
    after: Sample
    events: dict[str, float]


def steps(run: Run) -> Iterator[Step]:
    """The first is the machine's start, from nothing."""
    before = Sample("", {}, {})
    for after in run.samples:
        grown = {name: number - before.counts.get(name, 0) for name, number in after.counts.items()}
        yield Step(before, after, events_of(grown, before.gauges, after.gauges))
        before = after


def sum_events(of: Iterable[Step]) -> dict[str, float]:
    total = Counter[str]()
    for step in of:
        total.update(step.events)
    return dict(total)


def compare(runs: Iterable[Run], costs: Costs, command: str) -> Comparison:
    """The runs of each workload side by side, in the order of DESIGNS; on daemons with the same options."""
    by_workload: dict[str, list[Run]] = {}
    for run in runs:
        by_workload.setdefault(run.workload, []).append(run)
    return Comparison(
        version=VERSION,
        command=command,
        costs=[CostFigure(**asdict(constant)) for constant in costs.constants.values()],
        workloads=[_workload(group, costs) for group in by_workload.values()],
    )


def _workload(runs: Sequence[Run], costs: Costs) -> WorkloadFigures:
    runs = sorted(runs, key=lambda run: list(DESIGNS).index(run.design))
    designs = [design_figures(run, costs) for run in runs]
    why_not = unranked(designs)
    total = {it.design: it.time.total.us for it in designs if it.design not in why_not}
    events = {run.design: sum_events(steps(run)) for run in runs if run.design in total}
    return WorkloadFigures(
        workload=runs[0].workload,
        seed=runs[0].seed,
        params=runs[0].params,
        options=runs[0].options,
        designs=designs,
        order=tiers(total),
        unranked=why_not,
        changes=rank_changes(events, costs),
    )


def design_figures(run: Run, costs: Costs) -> DesignFigures:
    done = list(steps(run))
    last = run.samples[-1] if run.samples else Sample("", {}, {})
    values = costs.values()
    ends = _ends(done, values)
    return DesignFigures(
        design=run.design,
        faults=_faults(last.counts),
        latency={side: _latency(done, values, kinds) for side, kinds in SIDES.items()},
        pinned=_pinned(done, ends),
        tables=_tables(run.samples),
        told=Told(**{name: last.counts.get(name, 0) for name in Told.model_fields}),
        work=_work(last.counts),
        time=_time(done, costs),
        series=_series(run.samples, ends),
        refusals=[RefusalFigure(what=refusal.what, why=refusal.why) for refusal in run.refusals],
        problems=list(run.problems),
    )


def _ends(done: Sequence[Step], values: Values) -> list[float]:
    """The modelled time at which each step is over."""
    ends, now = [], 0.0
    for step in done:
        now += total_us(step.events, values)
        ends.append(now)
    return ends


def _faults(counts: Mapping[str, int]) -> FaultFigures:
    sides = {
        f"{side}{of}": counts.get(f"{side}_faults{of}", 0)
        for side in ("cpu", "io")
        for of in ("", "_major", "_spurious")
    }
    return FaultFigures(
        **sides,
        io_groups=counts.get("io_groups", 0),
        io_failed=counts.get("io_faults_failed", 0),
        retries=counts.get("fault_retries", 0),
    )


def _latency(done: Sequence[Step], values: Values, sides: tuple[str, ...]) -> Latency:
    there = [some for step in done for some in waits(step.events, values) if some.side in sides]
    classes = [0] * len(CLASSES)
    for some in there:
        classes[class_of(some.us)] += some.number
    count = sum(some.number for some in there)
    return Latency(
        count=count,
        classes=classes,
        min_us=_us(min((some.us for some in there), default=0.0)),
        max_us=_us(max((some.us for some in there), default=0.0)),
        avg_us=_us(sum(some.number * some.us for some in there) / count if count else 0.0),
    )


def _pinned(done: Sequence[Step], ends: Sequence[float]) -> PinnedFigures:
    """Page-time: within a step the number of pinned pages goes straight from what it was to what it is."""
    pages = [step.after.gauges.get("pinned_pages", 0) for step in done]
    page_us, then, was = 0.0, 0.0, 0
    for now, is_now in zip(ends, pages, strict=True):
        page_us += (was + is_now) / 2 * (now - then)
        then, was = now, is_now
    return PinnedFigures(
        pages_max=max(pages, default=0),
        pages_end=pages[-1] if pages else 0,
        page_seconds=round(page_us / S, 9),
    )


def table_pages(gauges: Mapping[str, int]) -> dict[str, list[int]]:
    """Owner -> its table pages of level 1, 2, ...; owners that have none are left out."""
    owners = dict.fromkeys(name.split(".")[1] for name in gauges if name.startswith("table_pages."))
    pages = {owner: [gauges.get(f"table_pages.{owner}.{level}", 0) for level in LEVELS] for owner in owners}
    return {owner: of_level for owner, of_level in pages.items() if any(of_level)}


def table_bytes(gauges: Mapping[str, int]) -> int:
    return PAGE_SIZE * sum(sum(of_level) for of_level in table_pages(gauges).values())


def _tables(samples: Sequence[Sample]) -> Tables:
    most = max(samples, key=lambda sample: table_bytes(sample.gauges), default=Sample("", {}, {}))
    return Tables(pages=table_pages(most.gauges), bytes_max=table_bytes(most.gauges))


def _work(counts: Mapping[str, int]) -> Work:
    """Of pages, fewer reported than written are missed, even if nobody counted them as missed."""
    given = {name: counts.get(name, 0) for name in Work.model_fields}
    short = given["pages_written"] - given["pages_reported"]
    return Work(**given | {"pages_missed": max(given["pages_missed"], short)})


def _time(done: Sequence[Step], costs: Costs) -> Time:
    events = sum_events(done)
    first = next((number for number, step in enumerate(done) if step.after.step == FIRST_DMA), None)
    return Time(
        total=_span(events, costs),
        first_dma=None if first is None else _span(sum_events(done[: first + 1]), costs),
        paid_us={payer.value: _us(cost) for payer, cost in paid(events, costs.values()).items()},
        plane=[round(part, 6) for part in plane(events, costs)],
    )


def _span(events: Mapping[str, float], costs: Costs) -> Span:
    low, high = swept_ends(costs)
    return Span(
        low_us=_us(total_us(events, costs.values(**low))),
        us=_us(total_us(events, costs.values())),
        high_us=_us(total_us(events, costs.values(**high))),
    )


def _series(samples: Sequence[Sample], ends: Sequence[float]) -> Series:
    every = -(-len(samples) // SERIES_MAX) or 1
    told = [n for n in range(len(samples)) if n % every == 0 or n == len(samples) - 1]
    samples = [samples[n] for n in told]
    return Series(
        step=[sample.step for sample in samples],
        us=[_us(ends[n]) for n in told],
        cpu_faults=[sample.counts.get("cpu_faults", 0) for sample in samples],
        io_faults=[sample.counts.get("io_faults", 0) for sample in samples],
        table_bytes=[table_bytes(sample.gauges) for sample in samples],
        pinned_bytes=[sample.gauges.get("pinned_pages", 0) * PAGE_SIZE for sample in samples],
    )


def _us(time: float) -> float:
    return round(time, 3)
