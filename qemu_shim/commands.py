"""What `qemu-shim` can be asked for, by its words alone: `--help` and a wrong word wait for nothing that a
command needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "list": "the scenarios and what each is about",
    "run": "run a scenario",
    "inspect": "a VM's slots, roots and counters; one address; its table as files for other tools",
    "compare": "the ways to give a device the guest's memory, side by side",
    "campaign": "many seeds and parameters, kept and resumable",
    "sim": "a scenario in one process, under schedules that are chosen (sim --help)",
}


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Of the whole command line, and of what follows each command, which takes nothing yet."""
    parser = argparse.ArgumentParser(
        prog="qemu-shim", description="The VMM, the guest and the scenarios of the shared-TDP model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    return parser, {name: commands.add_parser(name, help=what) for name, what in COMMANDS.items()}
