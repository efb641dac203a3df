"""What `qemu-shim compare` takes; kept apart from what it does, which only the command itself imports."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qemu_shim.scenarios.run import SEED_MAX
from qemu_shim.vmm.daemon_options import add_daemon_options

JOBS_MAX = 256


def add_compare(commands: Any, bounded: Any) -> None:
    """`bounded(low, high)` is argparse's type of a number in low..high."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare", help="the ways to give a device the guest's memory, side by side"
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all of them")
    parser.add_argument("--designs", metavar="A,B", help="default: all of them")
    parser.add_argument("--seed", type=bounded(0, SEED_MAX), default=1, metavar="N")
    parser.add_argument("--jobs", type=bounded(1, JOBS_MAX), metavar="N", help="default: one a core")
    add_daemon_options(parser)
    parser.add_argument("--costs", type=Path, metavar="FILE", help="TOML: constants of the cost model")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="show the figures that --json wrote; nothing is run",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write one HTML file that needs no other")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write comparison.json, .html and .md there")
