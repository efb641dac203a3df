"""`qemu-shim compare`: runs the workloads on the designs, shows the figures, writes them where asked.

Exit status: 0 all is well, a refusal included; 1 an invariant broke, a written page was never reported, or a
run failed; 2 the command was wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qemu_shim.compare.costs import CostError, read_costs
from qemu_shim.compare.documents import write_documents
from qemu_shim.compare.figures import compare
from qemu_shim.compare.play import play_all
from qemu_shim.compare.report import render
from qemu_shim.compare.run import Run
from qemu_shim.compare.schema import Comparison
from qemu_shim.compare.table import show
from qemu_shim.designs import DESIGNS
from qemu_shim.workloads.library import WORKLOADS

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """The command was wrong; nothing was started."""


def main(options: argparse.Namespace) -> int:
    try:
        costs = read_costs(options.costs)
        points = [
            (workload, design, options.seed)
            for workload in chosen(options.workloads, WORKLOADS, "workload")
            for design in chosen((options.designs or "").split(","), DESIGNS, "design")
        ]
        check_writable(options)
    except (UsageError, CostError) as error:
        print(f"qemu-shim compare: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        runs = list(with_progress(play_all(points, options.jobs), len(points)))
    except KeyboardInterrupt:
        print("interrupted: every daemon was stopped, nothing is left", file=sys.stderr)
        return EXIT_INTERRUPTED
    comparison = compare(runs, costs, command_of(options))
    show(comparison, Console())
    write(comparison, options)
    return EXIT_FAILED if failed(comparison) else 0


def chosen(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """Those named, each once, or all, in the order in which they are known."""
    named = {name.strip() for name in names} - {""}
    if unknown := sorted(named - known.keys()):
        raise UsageError(f"no {what} is named {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in named or not named]


def check_writable(options: argparse.Namespace) -> None:
    """Before minutes of work, not after."""
    for path in (options.json, options.report):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"{path}: its directory does not exist")
    if options.docs is not None and not options.docs.is_dir():
        raise UsageError(f"{options.docs}: no such directory")


def command_of(options: argparse.Namespace) -> str:
    """What reproduces the figures; where they were written is left out."""
    parts = ["qemu-shim", "compare", *options.workloads]
    if options.designs:
        parts += ["--designs", options.designs]
    if options.costs:
        parts += ["--costs", str(options.costs)]
    return " ".join([*parts, "--seed", str(options.seed)])


def with_progress(runs: Iterable[Run], total: int) -> Iterator[Run]:
    """A bar on a terminal, a line a run elsewhere; both on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing", total=total)
        for number, run in enumerate(runs, 1):
            progress.update(task, completed=number, description=f"{run.workload} {run.design}")
            if not console.is_terminal:
                print(f"{number}/{total} {run.workload} {run.design}", file=sys.stderr, flush=True)
            yield run


def write(comparison: Comparison, options: argparse.Namespace) -> None:
    if options.json is not None:
        write_text(options.json, comparison.model_dump_json(indent=1) + "\n")
    if options.report is not None:
        write_text(options.report, render(comparison))
    if options.docs is not None:
        write_documents(comparison, options.docs)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def failed(comparison: Comparison) -> bool:
    designs = [it for workload in comparison.workloads for it in workload.designs]
    return any(it.problems or it.work.pages_missed for it in designs)
