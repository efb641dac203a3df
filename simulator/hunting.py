"""`make planted`: each planted bug is sought by the small stories on every design, as people would seek it
who do not know it.

A schedule of one story on one design after the other, round and round, each pair with a strategy of its own,
so that no story has to be chosen for a bug.  What one range of seeds comes to is put on record at once.

    python -m simulator.hunting ID... --ranges N --most N --strategy S... --record FILE --json

Exit status: 0 each was found in every range, by the invariant it belongs to; 1 some were not; 2 the command
was wrong; 130 interrupted, and what is on record stays.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import structlog

from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.command import find as story_of
from simulator.planted.hunt import MAX_SCHEDULES, Catch, Effort, Hunted, Record, hunt, table
from simulator.planted.plant import Plant
from simulator.planted.registry import PLANTED, UnknownPlant, plant_of
from simulator.search.explore import Found, RunOne, smallest
from simulator.search.replay import Recorded
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.stories.library import STORIES
from simulator.world.schedule import Judged

RANGES = 3
RECORD = Path("build/hunted.json")
REPLAYS = 200  # to shrink one story


def pairs() -> list[tuple[str, str]]:
    """Every story on every design it can be played on; the design that is argued about first."""
    return [
        (name, design)
        for design in reversed(DESIGNS)
        for name, story in STORIES.items()
        if design in story.playable
    ]


def find(plant: Plant, strategy: str, seeds: range, most: int) -> Catch | None:
    """`plant` is in already.  At most `most` schedules of the range."""
    runs: list[tuple[RunOne, Recorded]] = [
        (Judged(story_of, story, design)(), Recorded(STRATEGIES[strategy].make(seeds.start)))
        for story, design in pairs()
    ]
    for schedule in range(min(most, len(seeds))):
        if not runs:
            break  # every strategy has seen all there is
        run_one, recorded = runs.pop(0)
        result = run_one(recorded)
        if result.invariant:
            found = Found(seeds.start, schedule + 1, result, recorded.answers, recorded.trace)
            shrunk, _ = smallest(run_one, found, REPLAYS)
            return Catch(shrunk.result.invariant, schedule + 1, sum(map(bool, shrunk.answers)))
        if recorded.ended(False):
            runs.append((run_one, recorded))
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make planted", description="how soon each planted bug is found")
    parser.add_argument("plants", nargs="*", metavar="ID", help="these (all)")
    parser.add_argument("--ranges", type=int, default=RANGES, metavar="N", help=f"of seeds ({RANGES})")
    parser.add_argument("--most", type=int, default=MAX_SCHEDULES, metavar="N", help="schedules of a range")
    parser.add_argument("--strategy", nargs="+", choices=tuple(STRATEGIES), default=[DEFAULT])
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help=f"resumable ({RECORD})")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        plants = [plant_of(name) for name in given.plants] or list(PLANTED.values())
    except UnknownPlant as error:
        parser.error(str(error))
    efforts = [Effort(strategy, given.ranges) for strategy in given.strategy]
    record = Record(given.record, f"{_version()} most {given.most}")
    results: list[Hunted] = []
    try:
        for result in hunt(plants, efforts, partial(find, most=given.most), record):
            results.append(result)
            print(f"{len(results)}/{len(plants) * len(efforts)} {result.plant.id}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted: {given.record} has what was found", file=sys.stderr)
        return EXIT_INTERRUPTED
    if given.json:
        print(json.dumps([_as_json(result) for result in results], indent=1))
    else:
        print(table(results))
        right = sum(result.is_right for result in results)
        print(f"{right} of {len(results)} found in every range, by the invariant they belong to")
    return 0 if all(result.is_right for result in results) else EXIT_FAILED


def _version() -> str:
    """Results are of these sources."""
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return ran.stdout.strip() or "no version"


def _as_json(result: Hunted) -> dict[str, object]:
    return {
        "plant": result.plant.id,
        "invariant": result.plant.invariant,
        "strategy": result.strategy,
        "found": [found._asdict() if found else None for found in result.finds],
        "seconds": round(result.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
