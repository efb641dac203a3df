"""Runs over seeds: the least, the median and the greatest of each figure, and what failed.

A figure is a count at the end of the run, the most that a gauge was after any step, or the modelled time,
which is made of those.  Runs that failed are named and not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.point import point_of
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import design_figures
from qemu_shim.vmm.daemon_options import as_said

Group = tuple[str, tuple[tuple[str, int], ...], tuple[tuple[str, str], ...], str]  # as in a Point


def figures(run: Run) -> dict[str, float]:
    if not run.samples:
        return {}
    gauges: dict[str, float] = {
        name: max(sample.gauges.get(name, 0) for sample in run.samples) for name in _gauges(run)
    }
    modelled = design_figures(run, default_costs()).time.total
    return {"modelled_us": modelled.us, **run.samples[-1].counts, **gauges}


def _gauges(run: Run) -> list[str]:
    return list(dict.fromkeys(name for sample in run.samples for name in sample.gauges))


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """As a JSON document."""
    failed = [run for run in runs if run.problems]
    return {
        "points": len(runs),
        "failed": [{"point": point_of(run).key, "problems": run.problems} for run in failed],
        "groups": [_group(group, members) for group, members in _grouped(runs)],
    }


def _grouped(runs: Iterable[Run]) -> Iterator[tuple[Group, list[Run]]]:
    groups: dict[Group, list[Run]] = {}
    for run in runs:
        if not run.problems:
            point = point_of(run)
            groups.setdefault((run.workload, point.params, point.options, run.design), []).append(run)
    yield from groups.items()


def _group(group: Group, runs: list[Run]) -> dict[str, Any]:
    workload, params, options, design = group
    each = [figures(run) for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    spread = {name: _spread([found.get(name, 0) for found in each]) for name in names}
    refusals = dict.fromkeys((refusal.what, refusal.why) for run in runs for refusal in run.refusals)
    return {
        "workload": workload,
        "params": dict(params),
        "options": dict(options),
        "design": design,
        "seeds": sorted(run.seed for run in runs),
        "figures": spread,
        "refusals": [{"what": what, "why": why} for what, why in refusals],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def as_text(document: dict[str, Any]) -> Iterator[str]:
    """A block for each workload and parameters, a column a design, `min/median/max` where seeds differ."""
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for group in document["groups"]:
        params = ", ".join(f"{name} {value}" for name, value in group["params"].items())
        params += as_said(group["options"])
        blocks.setdefault((group["workload"], params), []).append(group)
    for (workload, params), groups in blocks.items():
        yield f"{workload}  {params}"
        yield from _block(groups)
        yield ""
    yield f"{document['points']} points, {len(document['failed'])} failed"


def _block(groups: list[dict[str, Any]]) -> Iterator[str]:
    names = dict.fromkeys(name for group in groups for name in group["figures"])
    rows = [["", *(group["design"] for group in groups)]]
    rows.append(["seeds", *(str(len(group["seeds"])) for group in groups)])
    for name in names:
        spreads = [group["figures"].get(name) for group in groups]
        if any(spread and spread["max"] for spread in spreads):
            rows.append([name, *map(_cell, spreads)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join(["  " + first.ljust(widths[0]), *padded])
    for group in groups:
        for refusal in group["refusals"]:
            yield f"  {group['design']} refused: {refusal['what']}: {refusal['why']}"


def _cell(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    low, middle, high = (
        f"{spread[name]:g}" if spread[name] % 1 else f"{spread[name]:.0f}" for name in spread
    )
    return low if low == high else f"{low}/{middle}/{high}"
