"""The figures of one workload as rows of text, one cell a design: for all that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qemu_shim.study.compare.schema import CostFigure, DesignFigures, Span, WorkloadFigures

Cell = Callable[[DesignFigures], str]
PAYERS = {"vcpu": "the vCPU", "device": "the device", "host": "the host", "work": "the work itself"}
NO_FIGURE = "-"
UNRANKED = "†"  # behind the time of who is in no ranking


@dataclass(frozen=True, slots=True)
class Row:
    """`optional`: left out of a workload in which every cell is empty."""

    label: str
    cell: Cell
    optional: bool = False


def us_text(us: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if us >= scale * 0.9995:
            return f"{_digits(us / scale)} {unit}"
    return f"{_digits(us)} us"


def bytes_text(number: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << shift:
            return f"{_digits(number / (1 << shift))} {unit}"
    return f"{number} B"


def us_tick(us: float) -> str:
    """As short as an axis wants it."""
    unit, scale = ("s", 1e6) if us >= 1e6 else ("ms", 1e3) if us >= 1e3 else ("us", 1.0)
    return f"{us / scale:g} {unit}" if us else "0"


def bytes_tick(number: float) -> str:
    unit, shift = ("GiB", 30) if number >= 1 << 30 else ("MiB", 20) if number >= 1 << 20 else ("KiB", 10)
    return f"{number / (1 << shift):g} {unit}" if number else "0"


def _digits(value: float) -> str:
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}"


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def _some(*numbers: float, texts: Sequence[str] = ()) -> str:
    """The numbers, or nothing if all are 0."""
    return "/".join(texts or map(number_text, numbers)) if any(numbers) else NO_FIGURE


def _span(span: Span | None) -> str:
    return us_text(span.us) if span else NO_FIGURE


def _average(figures: DesignFigures) -> str:
    average = figures.latency["both"].avg_us
    return _some(average, texts=[us_text(average)])


def _descriptors(figures: DesignFigures) -> str:
    return _some(figures.told.iotlb_invalidations, figures.told.devtlb_invalidations)


def _pages(figures: DesignFigures) -> str:
    return _some(*[sum(of_level) for of_level in figures.tables.pages.values()])


ROWS = (
    Row("EPT violations", lambda it: number_text(it.faults.cpu)),
    Row("IO page faults", lambda it: number_text(it.faults.io)),
    Row("  in groups", lambda it: _some(it.faults.io_groups), True),
    Row("  from swap, vCPU/device", lambda it: _some(it.faults.cpu_major, it.faults.io_major), True),
    Row("  spurious, vCPU/device", lambda it: _some(it.faults.cpu_spurious, it.faults.io_spurious), True),
    Row("  retried/failed", lambda it: _some(it.faults.retries, it.faults.io_failed), True),
    Row("wait for a fault, average", _average),
    Row("pages pinned at most", lambda it: _some(it.pinned.pages_max), True),
    Row("  page-seconds", lambda it: _some(it.pinned.page_seconds), True),
    Row("table pages, by owner", _pages),
    Row("  bytes", lambda it: bytes_text(it.tables.bytes_max)),
    Row("notes sent/mapped", lambda it: _some(it.told.notes, it.told.notes_mapped), True),
    Row("notifier calls/KVM's flushes", lambda it: _some(it.told.notifier_calls, it.told.flushes), True),
    Row("descriptors, IOTLB/device TLB", _descriptors, True),
    Row("  waits for them", lambda it: _some(it.told.invalidation_waits), True),
    Row("kicks/messages", lambda it: _some(it.told.kicks, it.told.messages), True),
    Row("splits/collapses", lambda it: _some(it.work.splits, it.work.collapses), True),
    Row("pages swapped in/out", lambda it: _some(it.work.swap_ins, it.work.swap_outs), True),
    Row("moved by vCPU", lambda it: bytes_text(it.work.cpu_bytes)),
    Row("moved by DMA", lambda it: bytes_text(it.work.dma_bytes)),
    Row("written/reported dirty", lambda it: _some(it.work.pages_written, it.work.pages_reported), True),
    Row("  never reported", lambda it: _some(it.work.pages_missed), True),
    Row("time to the first DMA", lambda it: _span(it.time.first_dma)),
    Row("modelled time", lambda it: _span(it.time.total)),
    Row("  lowest", lambda it: us_text(it.time.total.low_us)),
    Row("  highest", lambda it: us_text(it.time.total.high_us)),
    *(
        Row(f"  paid by {words}", lambda it, payer=payer: us_text(it.time.paid_us[payer]))  # type: ignore[misc]
        for payer, words in PAYERS.items()
    ),
)  # fmt: skip


def rows_of(workload: WorkloadFigures) -> Iterator[tuple[str, list[str]]]:
    for row in ROWS:
        cells = [row.cell(it) if it.series.step else NO_FIGURE for it in workload.designs]
        if not (row.optional and set(cells) == {NO_FIGURE}):
            yield row.label, cells


def refusals_of(workload: WorkloadFigures) -> list[tuple[int, str, str]]:
    """Number, design and text of each refusal, numbered through the workload."""
    found = [(it.design, f"{r.what}: {r.why}") for it in workload.designs for r in it.refusals]
    return [(number, design, text) for number, (design, text) in enumerate(found, 1)]


def notes_of(workload: WorkloadFigures, costs: Sequence[CostFigure]) -> list[str]:
    """What is to be said besides figures and refusals."""
    return [
        *(f"FAILED, {it.design}: {problem}" for it in workload.designs for problem in it.problems),
        *(f"{design} is in no ranking: {why}" for design, why in workload.unranked.items()),
        *([f"Order: {order_text(workload.order)}"] if workload.order else []),
        *changes_of(workload, costs),
    ]


def is_first(workload: WorkloadFigures, design: str) -> bool:
    return any(design in tier for tier in workload.order[:1])


def order_text(order: Sequence[Sequence[str]]) -> str:
    """Those that tie stand with an equals sign between them."""
    return " < ".join(" = ".join(tier) for tier in order)


def changes_of(workload: WorkloadFigures, costs: Sequence[CostFigure]) -> list[str]:
    """A text each; what one design comes to lead at the same value of a constant stands together."""
    units = {cost.name: "" if cost.unit in ("ratio", "share") else f" {cost.unit}" for cost in costs}
    led: dict[str, list[str]] = {}
    for it in workload.changes:
        at = f"{it.constant} {'above' if it.above else 'below'} {it.at:.3g}{units[it.constant]}"
        led.setdefault(f"{at}: {it.overtakes} leads", []).append(it.overtaken)
    return [f"{what} {', '.join(names)}" for what, names in led.items()]
