"""A comparison in the terminal: one block a workload, a column a design, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from qemu_shim.study.compare.rows import notes_of, refusals_of, rows_of
from qemu_shim.study.compare.schema import Comparison, WorkloadFigures
from qemu_shim.vmm.daemon_options import as_said

TEXT_WIDTH = 100
INDENT = "  "
GAP = "  "
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_text(comparison: Comparison) -> str:
    lines = [line for workload in comparison.workloads for line in (*_block(workload, comparison), "")]
    assumed = ", ".join(cost.name for cost in comparison.costs if not cost.source)
    lines += _wrapped(f"Times are modelled (--costs FILE). Constants without a source: {assumed}.")
    return "\n".join(lines)


def _block(workload: WorkloadFigures, comparison: Comparison) -> Iterator[str]:
    refusals = refusals_of(workload)
    params = [f"seed {workload.seed}", *(f"{name} {value}" for name, value in workload.params.items())]
    yield from _wrapped(f"{workload.workload}: {', '.join(params)}{as_said(workload.options)}")
    heads = [
        it.design + " ".join(_raised(number) for number, design, _ in refusals if design == it.design)
        for it in workload.designs
    ]
    rows = list(rows_of(workload))
    yield from _aligned([label for label, _ in rows], heads, [cells for _, cells in rows])
    for number, design, text in refusals:
        yield from _wrapped(f"{_raised(number)} {design} refused: {text}", INDENT)
    for note in notes_of(workload, comparison.costs):
        yield from _wrapped(note, INDENT)


def _raised(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, TEXT_WIDTH, initial_indent=indent, subsequent_indent=indent + INDENT) or [""]


def _aligned(labels: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns that find no room beside the others follow below them."""
    first = max(map(len, labels), default=0)
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    while columns:
        number, room = 0, TEXT_WIDTH - len(INDENT) - first
        while number < len(columns) and (room := room - len(GAP) - widths[number]) >= 0:
            number += 1
        number = max(number, 1)
        for label, *cells in zip(["", *labels], *columns[:number], strict=True):
            padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
            yield f"{INDENT}{label:<{first}}{GAP}{GAP.join(padded)}".rstrip()
        columns, widths = columns[number:], widths[number:]
