"""The command line of `qemu-shim campaign`; apart, so that reading it loads nothing that runs points."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.study.command.compare_options import add_params
from qemu_shim.vmm.daemon_options import add_daemon_options


def add_options(parser: argparse.ArgumentParser, files: Mapping[str, Scenario]) -> None:
    """`files` are the scenarios of files that the command names."""
    parser.add_argument(
        "plan", nargs="?", metavar="FILE", help="what to run: a plan in TOML, or a scenario in FILE.py"
    )
    add_params(parser, files, lambda low, high: str)
    parser.add_argument("--workloads", type=_names, metavar="A,B", help="these (all)")
    parser.add_argument("--designs", type=_names, metavar="A,B", help="these (all)")
    parser.add_argument("--seeds", metavar="0..9", help="numbers and ranges, with commas between (0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="params",
        metavar="[WORKLOAD.]PARAM=1,2",
        help="values of a parameter; every combination is run",
    )
    add_daemon_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the runs are kept; a second start runs what is missing, and needs only --out",
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="points at a time (one a core)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster (extra: dask)")
    parser.add_argument("--retry-failed", action="store_true", help="run again what has failed, too")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON document")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)
