"""`qemu-shim compare`: runs the workloads on the designs, shows the figures, writes them where asked.

Exit status: 0 all is well, a refusal included; 1 an invariant broke, a written page was never reported, a run
failed or did other work than the rest without a refusal; 2 the command was wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from qemu_shim.scenarios.files import is_file
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.campaign.progress import ProgressBar
from qemu_shim.study.campaign.runner import DaemonsRefused, Interrupted, check_options, run_points
from qemu_shim.study.command.compare_options import option_of, param_dest
from qemu_shim.study.compare.costs import CostError, read_costs
from qemu_shim.study.compare.documents import DocumentError, check_document, write_documents
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.ranking import undeclared
from qemu_shim.study.compare.report import render
from qemu_shim.study.compare.schema import VERSION, Comparison
from qemu_shim.study.compare.table import as_text
from qemu_shim.study.workloads.library import WORKLOADS, workload_of
from qemu_shim.vmm.daemon_options import TRACED, as_said, given
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE


class UsageError(Exception):
    """The command was wrong; nothing was started."""


def main(options: argparse.Namespace) -> int:
    try:
        check_writable(options)
        comparison = read(options.source) if options.source else measured(options)
    except (UsageError, CostError, DaemonsRefused) as error:
        print(f"qemu-shim compare: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Interrupted:
        print("interrupted: every daemon was stopped, nothing is left", file=sys.stderr)
        return EXIT_INTERRUPTED
    write(comparison, options)  # first: whoever reads the table may stop reading
    print(as_text(comparison))
    if not failed(comparison):
        return 0
    print(f"to see more: {TRACED}", file=sys.stderr)
    return EXIT_FAILED


def measured(options: argparse.Namespace) -> Comparison:
    costs = read_costs(options.costs)
    designs = chosen((options.designs or "").split(","), DESIGNS, "design")
    points = [
        Point.of(workload, design, options.seed, params_of(options, workload), given(options))
        for workload in wanted(options.workloads)
        for design in designs
        if design in workload_of(workload).playable
    ]
    check_options(given(options))
    with ProgressBar(0, len(points)) as shown:
        runs = run_points(points, options.jobs, shown)
    return compare(runs, costs, command_of(options))


def wanted(names: Sequence[str]) -> list[str]:
    """The workloads that are named, then the files; all workloads, if none is named."""
    files = list(dict.fromkeys(name for name in names if is_file(name)))
    if files and len(files) == len(names):
        return files
    return chosen([name for name in names if not is_file(name)], WORKLOADS, "workload") + files


def params_of(options: argparse.Namespace, workload: str) -> dict[str, int]:
    """What was given of the parameters of a file's scenario."""
    if not is_file(workload):
        return {}
    said = {name: getattr(options, param_dest(name)) for name in workload_of(workload).params}
    return {name: value for name, value in said.items() if value is not None}


def read(path: Path) -> Comparison:
    try:
        data = path.read_bytes()
        document = json.loads(data)
        found = document.get("version") if isinstance(document, dict) else None
        if isinstance(found, int) and found != VERSION:
            raise UsageError(f"{path}: figures of version {found}, this shows {VERSION}: run `compare` again")
        return Comparison.model_validate_json(data)
    except (OSError, ValueError, ValidationError) as error:
        raise UsageError(f"{path}: {error}") from error


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
    if options.docs is not None:
        try:
            check_document(options.docs)
        except (OSError, DocumentError) as error:
            raise UsageError(f"{options.docs}: {error}") from error


def command_of(options: argparse.Namespace) -> str:
    """What reproduces the figures; where they were written is left out."""
    parts = ["qemu-shim", "compare", *options.workloads]
    for name in options.workloads:
        parts += [f"{option_of(param)} {value}" for param, value in params_of(options, name).items()]
    if options.designs:
        parts += ["--designs", options.designs]
    if options.costs:
        parts += ["--costs", str(options.costs)]
    return " ".join([*parts, "--seed", str(options.seed)]) + as_said(given(options))


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
    return any(
        undeclared(workload.designs, workload.unranked)
        or any(it.problems or it.work.pages_missed for it in workload.designs)
        for workload in comparison.workloads
    )
