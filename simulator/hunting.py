"""`make planted`: how soon each planted bug is found, by some seeds, on all cores.

What one range, the schedules of one seed, comes to is put on record at once, and is not sought again; how
short its story can be is asked of the default strategy's first ranges, for it takes longer than most hunts;
`--again`: unless it is of other sources than these.  `--others`: who is sought by other stories only finds
what nobody put there to be found; that is a record of its own.

    python -m simulator.hunting ID... --ranges N --most N --strategy S... --others --again
                                --record FILE --json

A range that ends in an error, or in a failure of the clean code (a schedule that comes to no planted line),
is told and not put on record.

Exit status: 0 each was found in every range, by the invariant it belongs to; 1 some were not, or a range was
not put on record; 2 the command was wrong; 130 interrupted, and what is on record stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path

from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.options import one_or_more
from simulator.planted.hunt import (
    MAX_SCHEDULES,
    Catch,
    Hunted,
    RangeEnd,
    Record,
    Sought,
    hunt,
    hunted,
    seed_of,
    table,
)
from simulator.planted.registry import PLANTED, UnknownPlant, plant_of, planted
from simulator.pool import Stop, interrupts, pooled
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.seeking import REPLAYS, CleanCodeFails, find, scouted
from simulator.settle import settle
from simulator.stories.written import is_written_for
from simulator.version import version

RANGES = 3
SHRUNK_RANGES = 3
CLEAN_FAILS = "the clean code fails, and `qemu-shim sim --replay` of this repeats it"
RECORD, RECORD_OF_OTHERS = Path("build/hunted.json"), Path("build/hunted-others.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    settle()
    try:
        plants = [plant_of(name) for name in given.plants] or [p for p in PLANTED.values() if p.simulated]
    except UnknownPlant as error:
        parser.error(str(error))
    wanted = [
        Sought(plant.id, strategy, number)
        for number in range(given.ranges)  # of all plants one range, before another
        for strategy in given.strategy
        for plant in plants
    ]
    path = given.record or (RECORD_OF_OTHERS if given.others else RECORD)
    record, code, began = Record(path), version(), time.monotonic()
    lost: list[Sought] = []
    seek = partial(_sought, lost, most=given.most, others=given.others, code=code, workers=given.workers)
    try:
        with interrupts(at_once=True):
            for done, (sought, end) in enumerate(
                hunt(wanted, seek, record, given.most, lambda kept: given.again and kept.code != code), 1
            ):
                print(f"{done}: {_told(sought, end)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: {path} has what was found", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenProcessPool:
        print(f"a worker was killed; {path} has what was found: run it again", file=sys.stderr)
        return EXIT_FAILED
    except CleanCodeFails as fails:  # before anything was planted
        print(f"{CLEAN_FAILS}: {fails}", file=sys.stderr)
        return EXIT_FAILED
    kept = record.read()
    results = hunted({sought: kept[sought] for sought in wanted if sought in kept})
    if given.json:
        print(json.dumps([_as_json(result) for result in results], indent=1))
    else:
        print(table(results))
        right = sum(result.is_right for result in results)
        print(
            f"{right} of {len(results)} found in every range, by the invariant they belong to, "
            f"{sum(result.is_met_by_others for result in results)} of them by stories not written for them; "
            f"{sum(result.seconds for result in results):,.0f} s of one core, "
            f"{time.monotonic() - began:,.0f} s now"
        )
    if lost:
        print(
            f"{len(lost)} ranges ended in an error, or in one of the clean code: see above", file=sys.stderr
        )
    is_whole = not lost and all(sought in kept for sought in wanted)
    return 0 if is_whole and all(result.is_right for result in results) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make planted", description="how soon each planted bug is found")
    parser.add_argument("plants", nargs="*", metavar="ID", help="these (all that a story may come to)")
    parser.add_argument(
        "--ranges", type=one_or_more, default=RANGES, metavar="N", help=f"a seed each ({RANGES})"
    )
    parser.add_argument(
        "--most", type=one_or_more, default=MAX_SCHEDULES, metavar="N", help="schedules of a range"
    )
    parser.add_argument(
        "--strategy",
        nargs="+",
        choices=tuple(STRATEGIES),
        default=[DEFAULT],
        help=f"what chooses schedules ({DEFAULT})",
    )
    parser.add_argument("--others", action="store_true", help="by no story that was written for it")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help=f"resumable ({RECORD}, {RECORD_OF_OTHERS})"
    )
    parser.add_argument("--again", action="store_true", help="what is on record of other sources, too")
    parser.add_argument(
        "--workers", type=one_or_more, default=os.cpu_count() or 1, metavar="N", help="one a core"
    )
    parser.add_argument("--json", action="store_true", help="what was found, in place of the table")
    return parser


def _told(sought: Sought, end: RangeEnd) -> str:
    found = "not found" if end.catch is None else "{0} after {1} schedules, {3} on {4}".format(*end.catch)
    return f"{sought.plant} {sought.strategy} {sought.number}: {found} ({end.seconds:.0f} s)"


def _as_json(result: Hunted) -> dict[str, object]:
    return {
        "plant": result.plant.id,
        "invariant": result.plant.invariant,
        "strategy": result.strategy,
        "found": [it.catch._asdict() if it.catch else None for it in result.ends],
        "seconds": round(result.seconds, 1),
    }


# -- processes ---------------------------------------------------------------------------------------------

_Worth = Mapping[tuple[str, str], float]
"""Of each pair, for one plant."""


def _sought(
    lost: list[Sought], tasks: Iterable[Sought], most: int, others: bool, code: str, workers: int
) -> Iterator[tuple[Sought, RangeEnd]]:
    """`lost`: to be filled with those that came to nothing that can be put on record."""
    tasks = list(tasks)
    reach = scouted(PLANTED.values()) if tasks else {}
    todo = [(task, {pair: of.get(task.plant, 0.0) for pair, of in reach.items()}) for task in tasks]
    with closing(pooled(todo, partial(_seek, most, others), workers)) as ended:
        for (task, _), future in filter(None, ended):
            try:
                catch, seconds = future.result()
            except BrokenProcessPool:
                raise
            except CleanCodeFails as fails:
                lost.append(task)
                _say(task, f"{CLEAN_FAILS}: {fails}")
            except Exception:  # a fault of ours, or of one child: the others are hours of work
                lost.append(task)
                _say(task, traceback.format_exc())
            else:
                yield task, RangeEnd(catch, most, round(seconds, 1), code)


def _say(task: Sought, what: str) -> None:
    print(f"{' '.join(map(str, task))}: {what}", file=sys.stderr, flush=True)


def _seek(most: int, others: bool, todo: tuple[Sought, _Worth], stop: Stop) -> tuple[Catch | None, float]:
    """In a worker.  What was caught, and the seconds of a core that it took, children's too.
    CleanCodeFails.
    """
    settle()
    task, worth = todo
    plant = plant_of(task.plant)

    def plays(story: str) -> bool:
        return not (others and is_written_for(story, plant))

    replays = REPLAYS if task.strategy == DEFAULT and task.number < SHRUNK_RANGES else 0
    before = sum(os.times()[:4])
    with planted(task.plant):
        found = find(task.strategy, seed_of(task.number), most, worth.__getitem__, stop, plays, replays)
    return found, sum(os.times()[:4]) - before


if __name__ == "__main__":
    sys.exit(main())
