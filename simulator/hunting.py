"""`make planted`: each planted bug is sought by the small stories on every design, as people would seek it
who do not know it.

Some schedules of one story on one design after the other, round and round, each pair with a strategy of its
own, so that no story has to be chosen for a bug.  What one range of seeds comes to is put on record at once.

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
from simulator.search.explore import Player, Tally, explore, smallest
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.stories.library import STORIES
from simulator.world.forked import Forked
from simulator.world.schedule import Judged

RANGES = 3
RECORD = Path("build/hunted.json")
TURN = 5  # schedules of a story, in one machine: all pairs have had theirs within some thousand
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
    named = STRATEGIES[strategy]
    searches = []
    for story, design in pairs():
        judged = Judged(story_of, story, design)
        player: Player = (
            judged(TURN) if named.seeded else Forked(judged)
        )  # it compares: one state to begin in
        searches.append((player, named.make(seeds.start)))
    done = 0
    while searches and done < min(most, len(seeds)):
        player, search = searches.pop(0)
        tally = explore(player, search, seeds.start, min(TURN, most - done), _has_found)
        if tally.found:
            shrunk, _ = smallest(player, tally.found[0], REPLAYS)
            steps = sum(map(bool, shrunk.answers))
            return Catch(shrunk.result.invariant, done + shrunk.schedule, steps)
        done += tally.schedules + tally.given_up
        if not tally.over:
            searches.append((player, search))
    return None  # or every strategy has seen all there is


def _has_found(tally: Tally) -> bool:
    return bool(tally.found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make planted", description="how soon each planted bug is found")
    parser.add_argument("plants", nargs="*", metavar="ID", help="these (all that a story may come to)")
    parser.add_argument("--ranges", type=int, default=RANGES, metavar="N", help=f"of seeds ({RANGES})")
    parser.add_argument("--most", type=int, default=MAX_SCHEDULES, metavar="N", help="schedules of a range")
    parser.add_argument("--strategy", nargs="+", choices=tuple(STRATEGIES), default=[DEFAULT])
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help=f"resumable ({RECORD})")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        plants = [plant_of(name) for name in given.plants] or [p for p in PLANTED.values() if p.simulated]
    except UnknownPlant as error:
        parser.error(str(error))
    efforts = [Effort(strategy, given.ranges) for strategy in given.strategy]
    record = Record(given.record, f"{version()} most {given.most}")
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


def version() -> str:
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
