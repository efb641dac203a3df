"""`python -m tests.planted [ID...] [--in PATH...]`: run the suite with each bug planted, and say who notices.

It can be stopped and goes on where it was (build/planted.json).  Who fails and is no known killer of that bug
(killers.json) is printed, and makes the status 1; `--write` takes them all in.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from simulator.planted.registry import PLANTED, plant_of
from tests.planted.sweep import known, outcomes, sweep, write_killers


def main() -> int:
    options = argparse.ArgumentParser("python -m tests.planted", description=__doc__)
    options.add_argument("ids", nargs="*", metavar="ID", help="of planted bugs; all of them")
    options.add_argument("--in", nargs="+", dest="paths", metavar="PATH", default=["tests"], help="of tests")
    options.add_argument("--again", action="store_true", help="run what is on record, too")
    options.add_argument("--write", action="store_true", help="who fails is a known killer from now on")
    options.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # a process of ours
    given = options.parse_args()
    plants = [plant_of(name).id for name in given.ids] or list(PLANTED)
    if given.here:
        return outcomes([*given.paths, "--plant", plants[0]], given.here)
    unknown = 0
    for plant, path, done, ran in sweep(plants, given.paths, again=given.again):
        new = [test for test in done.failed if not known(plant, test)]
        unknown += bool(new)
        how = f"{done.seconds:.0f} s" if ran else "on record"
        print(f"{plant}: {path}: {len(done.failed)} of {done.ran} fail ({how})", flush=True)
        for test in new:
            print(f"    not known: {test}", flush=True)
    if given.write:
        write_killers()
        return 0
    return int(unknown > 0)


if __name__ == "__main__":
    sys.exit(main())
