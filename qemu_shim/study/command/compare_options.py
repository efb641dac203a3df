"""What `qemu-shim compare` takes; kept apart from what it does, which only the command itself imports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu_shim.scenarios.files import BadFile
from qemu_shim.scenarios.run import SEED_MAX
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.daemon_options import add_daemon_options

JOBS_MAX = 256


def add_compare(parser: argparse.ArgumentParser, bounded: Any, files: Mapping[str, Scenario]) -> None:
    """`bounded(low, high)` is argparse's type of a number in low..high; `files` are the scenarios of files
    that the command names.
    """
    parser.add_argument(
        "workloads",
        nargs="*",
        metavar="WORKLOAD",
        help="or FILE.py (docs/tutorial.md); default: all",
    )
    parser.add_argument("--designs", metavar="A,B", help="default: all of them")
    parser.add_argument("--seed", type=bounded(0, SEED_MAX), default=1, metavar="N")
    parser.add_argument("--jobs", type=bounded(1, JOBS_MAX), metavar="N", help="default: one a core")
    add_daemon_options(parser)
    add_params(parser, files, bounded)
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


def add_params(parser: argparse.ArgumentParser, files: Mapping[str, Scenario], bounded: Any) -> None:
    """The parameters of files' scenarios, each an option; those of one name once.  BadFile."""
    added: set[str] = set()
    for file, scenario in files.items():
        for name, param in scenario.params.items():
            if name in added:
                continue
            added.add(name)
            try:
                parser.add_argument(
                    option_of(name),
                    dest=param_dest(name),
                    type=bounded(param.low, param.high),
                    metavar="N",
                    help=f"{param.help} (default {param.default}, {param.low}..{param.high})",
                )
            except argparse.ArgumentError:
                raise BadFile(
                    f"{file}: its parameter {name} is an option of the command: rename it"
                ) from None


def option_of(param: str) -> str:
    return f"--{param.replace('_', '-')}"


def param_dest(param: str) -> str:
    return f"param_{param}"
