"""A comparison in the terminal: one block a workload, a column a design, at most 100 columns wide."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qemu_shim.compare.rows import change_text, refusals_of, rows_of
from qemu_shim.compare.schema import Comparison, WorkloadFigures

WIDTH = 100
INDENT = (0, 0, 0, 2)
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def show(comparison: Comparison, console: Console) -> None:
    for workload in comparison.workloads:
        console.print(_block(workload, comparison), width=min(WIDTH, console.width), soft_wrap=False)
    assumed = [cost.name for cost in comparison.costs if not cost.source]
    console.print(
        Text(f"Times are modelled (--costs FILE). Constants without a source: {', '.join(assumed)}."),
        width=min(WIDTH, console.width),
    )


def _block(workload: WorkloadFigures, comparison: Comparison) -> RenderableType:
    refusals = refusals_of(workload)
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for figures in workload.designs:
        marks = " ".join(_raised(number) for number, design, _ in refusals if design == figures.design)
        heading = Text(figures.design, "bold") + Text(marks)
        table.add_column(heading, justify="right")
    for label, cells in rows_of(workload):
        table.add_row(label, *cells)
    params = [f"seed {workload.seed}", *(f"{name} {value}" for name, value in workload.params.items())]
    notes = [
        *(f"{_raised(number)} {design} refused: {text}" for number, design, text in refusals),
        *(f"INVARIANT BROKEN, {it.design}: {problem}" for it in workload.designs for problem in it.problems),
        *(change_text(change, comparison.costs) for change in workload.changes),
    ]
    return Group(
        Text(workload.workload, "bold") + Text(f"  {', '.join(params)}", "not bold"),
        Padding(table, INDENT),
        *(Padding(note, INDENT) for note in map(Text, notes)),
        "",
    )


def _raised(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)
