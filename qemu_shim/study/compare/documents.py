"""docs/results/comparison.md, .json and .html of one comparison: figures are generated, sentences are not.

A figure lies between `<!-- figures: NAME -->` and `<!-- end -->`; all else is somebody's text, which a test
holds to the figures (tests/tidy/test_comparison.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qemu_shim.study.compare.ranking import TIE
from qemu_shim.study.compare.report import render
from qemu_shim.study.compare.rows import (
    UNRANKED,
    bytes_text,
    changes_of,
    is_first,
    number_text,
    order_text,
    refusals_of,
    us_text,
)
from qemu_shim.study.compare.schema import Comparison, DesignFigures, Work, WorkloadFigures
from qemu_shim.study.compare.sensitivity import SWEPT
from qemu_shim.vmm.designs import DESIGNS

NAME = "comparison"
LATE = "late-attach"
FIGURES_BLOCK = re.compile(r"(?s)(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)")


class DocumentError(ValueError):
    """The document lacks a place for a figure, or has one for none."""


def write_documents(comparison: Comparison, directory: Path) -> None:
    """The document must be there; what goes with it is written anew."""
    document = directory / f"{NAME}.md"
    text = filled(document.read_text(encoding="utf-8"), comparison)
    document.write_text(text, encoding="utf-8")
    (directory / f"{NAME}.json").write_text(comparison.model_dump_json() + "\n", encoding="utf-8")
    (directory / f"{NAME}.html").write_text(render(comparison), encoding="utf-8")


def check_document(directory: Path) -> None:
    """OSError, DocumentError: figures could not be written there."""
    check_places((directory / f"{NAME}.md").read_text(encoding="utf-8"))


def check_places(text: str) -> None:
    places = [match[2] for match in FIGURES_BLOCK.finditer(text)]
    if sorted(places) != sorted(FIGURES):
        raise DocumentError(f"{NAME}.md has places for {', '.join(places)}; figures are {', '.join(FIGURES)}")


def filled(text: str, comparison: Comparison) -> str:
    """The document with this comparison's figures."""
    check_places(text)
    figures = {name: make(comparison) for name, make in FIGURES.items()}
    return FIGURES_BLOCK.sub(lambda match: f"{match[1]}{figures[match[2]]}\n{match[3]}", text)


def _command(comparison: Comparison) -> str:
    return f"    {comparison.command}"


def _by_design(
    cell: Callable[[WorkloadFigures, DesignFigures], str],
) -> Callable[[Comparison], str]:
    """A table with a row a workload, a column a design."""

    def make(comparison: Comparison) -> str:
        names = _designs(comparison)
        rows = []
        for workload in comparison.workloads:
            of: Mapping[str, DesignFigures] = {it.design: it for it in workload.designs if it.series.step}
            cells = [cell(workload, of[name]) if name in of else "-" for name in names]
            rows.append([f"`{workload.workload}`", *cells])
        return _markdown(["workload", *names], rows)

    return make


def _designs(comparison: Comparison) -> list[str]:
    seen = {it.design for workload in comparison.workloads for it in workload.designs}
    return [name for name in DESIGNS if name in seen]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _time(workload: WorkloadFigures, it: DesignFigures) -> str:
    text = us_text(it.time.total.us)
    best = f"**{text}**" if is_first(workload, it.design) else text
    best += UNRANKED * (it.design in workload.unranked)
    low, high = us_text(it.time.total.low_us), us_text(it.time.total.high_us)
    return best if low == high else f"{best} ({low} to {high})"


def _faults(_: WorkloadFigures, it: DesignFigures) -> str:
    groups = f" in {number_text(it.faults.io_groups)}" if it.faults.io_groups < it.faults.io else ""
    return f"{number_text(it.faults.cpu)} + {number_text(it.faults.io)}{groups}"


def _memory(_: WorkloadFigures, it: DesignFigures) -> str:
    pinned = f", {number_text(it.pinned.pages_max)} pinned" if it.pinned.pages_max else ""
    return f"{bytes_text(it.tables.bytes_max)}{pinned}"


def _told(_: WorkloadFigures, it: DesignFigures) -> str:
    descriptors = it.told.iotlb_invalidations + it.told.devtlb_invalidations
    return f"{number_text(descriptors)} / {number_text(it.told.invalidation_waits)}"


def _dirty(comparison: Comparison) -> str:
    names = _designs(comparison)
    rows = []
    for workload in comparison.workloads:
        of = {it.design: it.work for it in workload.designs if it.work.pages_written}
        if of:
            cells = [_dirty_text(of[name]) if name in of else "-" for name in names]
            rows.append([f"`{workload.workload}`", *cells])
    return _markdown(["workload", *names], rows)


def _dirty_text(work: Work) -> str:
    text = f"{number_text(work.pages_written)} / {number_text(work.pages_reported)}"
    return f"{text}, **{number_text(work.pages_missed)} missed**" if work.pages_missed else text


def _first_dma(_: WorkloadFigures, it: DesignFigures) -> str:
    return us_text(it.time.first_dma.us) if it.time.first_dma else "-"


def _unranked(comparison: Comparison) -> str:
    found = [
        f"- `{workload.workload}`, {design}: {why}"
        for workload in comparison.workloads
        for design, why in workload.unranked.items()
    ]
    return "\n".join(found) or "- None."


def _order(comparison: Comparison) -> str:
    ranked = [workload for workload in comparison.workloads if workload.order]
    return "\n".join(f"- `{workload.workload}`: {order_text(workload.order)}" for workload in ranked)


def _ties(_: Comparison) -> str:
    return (
        f"Times that differ by less than {TIE:.0%} are a tie: bold are all that tie with the cheapest.\n"
        f"{UNRANKED} is in no ranking, because it refused what the workload is about."
    )


def _swept(comparison: Comparison) -> str:
    ranges = {it.name: it for it in comparison.costs if it.name in SWEPT}
    factor, swap_in = (ranges[name] for name in SWEPT)
    bounds = f"{number_text(factor.low)} to {number_text(factor.high)}"
    return (
        f"- an IO page fault, {bounds} times a CPU's [{factor.source}],\n"
        f"- a page read back from swap, {us_text(swap_in.low)} to {us_text(swap_in.high)} [{swap_in.source}]."
    )


def _late(comparison: Comparison) -> str:
    """A sentence; empty if the workload is not in it."""
    told = [
        f"`{it.design}` {number_text(it.faults.io)}"
        for workload in comparison.workloads
        if workload.workload == LATE
        for it in workload.designs
    ]
    return f"IO page faults of `{LATE}`: {', '.join(told)}." if told else "Not played."


def _changes(comparison: Comparison) -> str:
    found = [
        f"- `{workload.workload}`: {'; '.join(changes_of(workload, comparison.costs))}"
        for workload in comparison.workloads
        if workload.changes
    ]
    return "\n".join(found) or "- None: the order is the same over all ranges."


def _refusals(comparison: Comparison) -> str:
    found = [
        f"- `{workload.workload}`, {design}: {text}"
        for workload in comparison.workloads
        for _, design, text in refusals_of(workload)
    ]
    return "\n".join(found) or "- None."


FIGURES: Mapping[str, Callable[[Comparison], str]] = {
    "command": _command,
    "swept": _swept,
    "ties": _ties,
    "time": _by_design(_time),
    "order": _order,
    "faults": _by_design(_faults),
    "first-dma": _by_design(_first_dma),
    "memory": _by_design(_memory),
    "late-attach": _late,
    "told": _by_design(_told),
    "dirty": _dirty,
    "changes": _changes,
    "refusals": _refusals,
    "unranked": _unranked,
}
