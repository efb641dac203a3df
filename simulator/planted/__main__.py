"""`python -m simulator.planted ID DAEMON ARGS...` runs a daemon with a bug in it; `--list` says which."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from qemu_shim.vmm.daemons import DAEMONS
from qemu_shim.vmm.interrupt import EXIT_USAGE
from simulator.planted.plant import Plant
from simulator.planted.registry import PLANTED, UnknownPlant, planted


def run(name: str, daemon: str, argv: list[str]) -> int:
    """The daemon's own main with the bug on; its exit status."""
    with planted(name):
        status: int = importlib.import_module(f"{daemon}.__main__").main(argv)
        return status


def described(plant: Plant) -> dict[str, object]:
    return {
        "id": plant.id,
        "what": plant.what,
        "invariant": plant.invariant,
        "races": list(plant.races),
        "functions": [edit.where for edit in plant.edits],
    }


def listing() -> str:
    wide = max(map(len, PLANTED))
    return "\n".join(f"{plant.id:{wide}}  {plant.invariant:3}  {plant.what}" for plant in PLANTED.values())


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m simulator.planted", description=__doc__)
    options.add_argument("--list", action="store_true", help="every planted bug, its invariant, the mistake")
    options.add_argument("--json", action="store_true", help="the list with everything known of each")
    options.add_argument("id", nargs="?", help="of the bug")
    options.add_argument("daemon", nargs="?", choices=[spec.module for spec in DAEMONS])
    options.add_argument("args", nargs=argparse.REMAINDER, help="the daemon's own options")
    given = options.parse_args(argv)
    if given.list or given.json:
        print(json.dumps([described(p) for p in PLANTED.values()], indent=1) if given.json else listing())
        return 0
    if given.daemon is None:
        options.error("say which bug and which daemon, or --list")
    try:
        return run(given.id, given.daemon, given.args)
    except UnknownPlant as error:
        print(f"simulator.planted: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
