"""A comparison as one HTML file that needs no other: plots, their values as tables, and the JSON itself.

The plots are drawn here (`svg.py`), so the page reads the same without scripts; its script only moves the two
constants that matter most.  docs/decisions/0012 says why no library draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qemu_shim.study.compare.latency import CLASSES
from qemu_shim.study.compare.ranking import TIE
from qemu_shim.study.compare.rows import (
    UNRANKED,
    bytes_tick,
    is_first,
    notes_of,
    number_text,
    refusals_of,
    rows_of,
    us_text,
    us_tick,
)
from qemu_shim.study.compare.schema import (
    Comparison,
    CostFigure,
    DesignFigures,
    Series,
    Time,
    WorkloadFigures,
)
from qemu_shim.study.compare.sensitivity import SWEPT
from qemu_shim.study.compare.svg import Bar, Curve, Line, bars, fan, histogram, lines
from qemu_shim.vmm.daemon_options import as_said
from qemu_shim.vmm.designs import DESIGNS

PALE_TO_FULL = ("work", "host", "vcpu", "device")
SLIDER_STEPS = 1000
SLIDERS = {"io_fault_factor": "IO fault / CPU fault", "swap_in": "swap-in of a page"}

Value = Callable[[Series], Sequence[float]]
OVER_TIME: tuple[tuple[str, Value, Callable[[float], str], int], ...] = (
    ("IO page faults so far", lambda series: series.io_faults, number_text, 10),
    ("EPT violations so far", lambda series: series.cpu_faults, number_text, 10),
    ("Table bytes", lambda series: series.table_bytes, bytes_tick, 2),
    ("Pinned bytes", lambda series: series.pinned_bytes, bytes_tick, 2),
)
FAN_POINTS = 9
TRADES: tuple[tuple[str, Callable[[DesignFigures], float]], ...] = (
    ("time", lambda it: it.time.total.us),
    ("first DMA", lambda it: it.time.first_dma.us if it.time.first_dma else 0.0),
    ("IO faults", lambda it: it.faults.io),
    ("tables", lambda it: it.tables.bytes_max),
    ("pinned", lambda it: it.pinned.page_seconds),
)


def render(comparison: Comparison) -> str:
    """The same comparison gives the same page."""
    kinds = list(dict.fromkeys(it.design for w in comparison.workloads for it in w.designs))
    return (
        _environment()
        .get_template("report.html")
        .render(
            comparison=comparison,
            tie=TIE,
            unranked=UNRANKED,
            designs=[(it, _key(it.name)) for it in DESIGNS.values() if it.name in kinds],
            sliders=[_slider(cost) for cost in comparison.costs if cost.name in SWEPT],
            workloads=[_workload(workload, comparison, kinds) for workload in comparison.workloads],
            tradeoff=_tradeoff(comparison),
            tradeoff_values=_tradeoff_values(comparison),
            # "<" could end the script element; in JSON it may be written as an escape
            json=Markup(comparison.model_dump_json().replace("<", "\\u003c")),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qemu_shim.study.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["num"] = number_text
    return environment


def _key(name: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 34 8" aria-hidden="true"><polyline class="{name}" points="0,4 34,4"/></svg>'
    )


def _slider(cost: CostFigure) -> dict[str, Any]:
    place = (
        math.log(cost.value / cost.low) / math.log(cost.high / cost.low) if 0 < cost.low < cost.high else 0
    )
    text = us_text(cost.value) if cost.unit == "us" else f"{number_text(cost.value)} x"
    return {
        "name": cost.name,
        "title": SLIDERS[cost.name],
        "at": round(place * SLIDER_STEPS),
        "text": text,
        "low": cost.low,
        "high": cost.high,
        "value": cost.value,
    }


def _workload(workload: WorkloadFigures, comparison: Comparison, kinds: Sequence[str]) -> dict[str, Any]:
    params = [f"seed {workload.seed}", *(f"{name} {value}" for name, value in workload.params.items())]
    notes = [
        *(f"{number}. {design} refused: {text}" for number, design, text in refusals_of(workload)),
        *(f"{note}." for note in notes_of(workload, comparison.costs)),
    ]
    return {
        "name": workload.workload,
        "params": ", ".join(params) + as_said(workload.options),
        "notes": notes,
        "matrix": _matrix(workload, kinds),
        "figures": _figures(workload, comparison),
        "every_figure": _values(workload),
    }


def _matrix(workload: WorkloadFigures, kinds: Sequence[str]) -> list[dict[str, Any]]:
    ran = {it.design: it for it in workload.designs if it.series.step}
    most = max((it.time.total.us for it in ran.values()), default=0) or 1.0
    return [
        {
            "design": name,
            "text": us_text(ran[name].time.total.us) if name in ran else "",
            "best": is_first(workload, name),
            "percent": f"{100 * ran[name].time.total.us / most:.1f}" if name in ran else "",
            "mark": UNRANKED if name in workload.unranked else "",
        }
        for name in DESIGNS
        if name in kinds
    ]


def _figures(workload: WorkloadFigures, comparison: Comparison) -> list[dict[str, Any]]:
    ran = [it for it in workload.designs if it.series.step]
    under = sorted(ran, key=lambda it: -DESIGNS[it.design].stroke.width)  # the widest first
    figures = [
        {
            "title": "Modelled time",
            "plot": bars(f"{workload.workload}: modelled time", [_bar(it.design, it.time) for it in ran]),
            "caption": "from pale to full: the work itself, paid by host, by vCPU, by the waiting device",
        },
        *_sensitivity(workload, comparison, under),
    ]
    for title, value, text, base in OVER_TIME:
        drawn = [Line(it.design, [(0, 0), *zip(it.series.us, value(it.series), strict=True)]) for it in under]
        plot = lines(f"{workload.workload}: {title}", drawn, us_tick, text, base)
        figures.append({"title": title, "plot": plot, "caption": "over modelled time"})
    counts = {it.design: it.latency["both"].classes for it in ran}
    figures.append(
        {
            "title": "Waits for a fault",
            "plot": histogram(f"{workload.workload}: waits for a fault", CLASSES, counts, number_text),
            "caption": "vCPUs' faults and page request groups, in Linux's classes for VT-d; logarithmic",
        }
    )
    return figures


def _bar(name: str, time: Time) -> Bar:
    return Bar(name, {payer: time.paid_us[payer] for payer in PALE_TO_FULL}, us_text(time.total.us))


def _sensitivity(
    workload: WorkloadFigures, comparison: Comparison, drawn: Sequence[DesignFigures]
) -> list[dict[str, Any]]:
    """Time over the IO fault's cost, each with the band of the swap-in's; none if that cost has no range."""
    factor, swap_in = (next(c for c in comparison.costs if c.name == name) for name in SWEPT)
    if not 0 < factor.low < factor.high:
        return []
    ratio = factor.high / factor.low
    xs = [factor.low * ratio ** (n / (FAN_POINTS - 1)) for n in range(FAN_POINTS)]

    def times(figures: DesignFigures, swap_us: float) -> list[float]:
        fixed, a_factor, a_us = figures.time.plane
        return [fixed + a_factor * x + a_us * swap_us for x in xs]

    curves = [
        Curve(it.design, *(times(it, us) for us in (swap_in.low, swap_in.value, swap_in.high)))
        for it in drawn
    ]
    title = f"{workload.workload}: modelled time over the cost of an IO fault"
    bounds = f"{us_tick(swap_in.low)} to {us_tick(swap_in.high)}"
    return [
        {
            "title": "Sensitivity",
            "plot": fan(title, xs, curves, lambda x: f"{x:g} x", us_tick),
            "caption": f"modelled time over IO fault / CPU fault; bands: swap-in from {bounds}",
        }
    ]


def _values(workload: WorkloadFigures) -> Markup:
    """Every figure, and the heights of the histogram; what is over time the page's script writes out."""
    rows = list(rows_of(workload))
    for number, name in enumerate(CLASSES):
        rows.append(
            (
                f"waits of {name}",
                [number_text(it.latency["both"].classes[number]) for it in workload.designs],
            )
        )
    return _table([it.design for it in workload.designs], rows)


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Markup:
    head = "".join(f'<th scope="col">{escape(column)}' for column in ("", *columns))
    body = "".join(
        f'<tr><th scope="row">{escape(label)}' + "".join(f"<td>{escape(cell)}" for cell in cells)
        for label, cells in rows
    )
    return Markup(f'<div class="wide"><table><thead><tr>{head}<tbody>{body}</table></div>')


def _shares(comparison: Comparison) -> dict[str, list[float]]:
    """Design -> each of TRADES in shares of the dearest design's, the mean over the workloads in which all
    are ranked: each counts the same, however long it takes.
    """
    whole = [w for w in comparison.workloads if not w.unranked]
    most = [[max(map(value, w.designs)) or 1.0 for _, value in TRADES] for w in whole]
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(it.design for w in whole for it in w.designs):
        own = [
            [value(it) / largest for (_, value), largest in zip(TRADES, of_workload, strict=True)]
            for w, of_workload in zip(whole, most, strict=True)
            for it in w.designs
            if it.design == name
        ]
        found[name] = [fmean(shares) for shares in zip(*own, strict=True)]
    return found


def _tradeoff(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "design": name,
            "plot": bars(
                f"{name}: mean share of the dearest design's",
                [
                    Bar(title, {name: share, "rest": 1 - share}, f"{share:.0%}")
                    for (title, _), share in zip(TRADES, shares, strict=True)
                ],
                width=240,
                right=98,
            ),
        }
        for name, shares in _shares(comparison).items()
    ]


def _tradeoff_values(comparison: Comparison) -> Markup:
    shares = _shares(comparison)
    rows = [(title, [f"{shares[name][n]:.0%}" for name in shares]) for n, (title, _) in enumerate(TRADES)]
    table = _table(list(shares), rows)
    return Markup(f"<details><summary>The trade-off as numbers</summary>{table}</details>")
