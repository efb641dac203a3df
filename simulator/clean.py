"""`make schedules`: all small stories on all designs, and all scenarios and workloads, with no bug planted.

By turns, those first that have least so far: each has as many schedules as the others, but for a turn, when
it is enough, or interrupted, which loses nothing but the schedules under way.  Each story is played without
faults and, a 16th as often, with all kinds of them, as who seeks a planted bug plays it: what fails here
would be taken for one there.  What they come to are rows of the record (simulator/rows.py), to which the next
run adds, with seeds that nobody had before.

    python -m simulator.clean --story S... --design D... --schedules N --seeds N --strategy NAME
                              --faults KIND,... --seconds N --workers N --again --record FILE

Exit status: 0 nothing broke, 1 something did (with the line that repeats it) or nothing was played, 2 the
command was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import NamedTuple

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.campaign import NOTHING_PLAYED, WORKER_DIED
from simulator.command import OF_SMALL_SHARD, PLAYED, SCHEDULES_OF_SHARD, begin, faults_of, find, repeat
from simulator.faults.kinds import ALL, FAULTED_COST
from simulator.options import NothingToPlay, none_or_more, one_or_more, playable
from simulator.pool import Stop, interrupts, pooled
from simulator.rows import CleanRow, Play, Rows
from simulator.search.explore import Tally, explore
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.stories.library import STORIES
from simulator.version import version
from simulator.world.schedule import Judged

CLEAN = Path("docs/results/clean.json")
SCHEDULES, SEEDS = 800, 10
WRITES_S = 10.0  # who kills this process loses no more than that


class Shard(NamedTuple):
    """The first schedules of a seed."""

    play: Play
    seed: int
    schedules: int


def stories(names: Sequence[str], designs: Sequence[str], strategy: str, faults: str) -> list[Play]:
    """Each on all designs, before another.  NothingToPlay."""
    return [Play(name, design, strategy, faults) for name, design in playable(names, designs)]


def scenarios(strategy: str, faults: str) -> Iterator[Play]:
    """Each on the last of its designs, in the order of DESIGNS: `shared`, where that can play it."""
    for name, scenario in PLAYED.items():
        if isinstance(scenario, Scenario):
            yield Play(name, scenario.playable[-1], strategy, faults, whole=True)


def shards(first: Mapping[Play, int], schedules: int, seeds: int) -> Iterator[Shard]:
    """One of each play, and again, from its first seed on: `schedules` of each small story, or their share of
    them with all faults; all that a shard has of `seeds` of each other.
    """
    plays = list(first)
    size = {play: SCHEDULES_OF_SHARD if play.whole else OF_SMALL_SHARD for play in plays}
    left = {play: seeds * size[play] if play.whole else ceil(schedules / _cost(play)) for play in plays}
    seed = dict(first)
    while any(left.values()):
        for play in plays:
            if now := min(left[play], size[play]):
                yield Shard(play, seed[play], now)
                left[play] -= now
                seed[play] += 1


def _cost(play: Play) -> int:
    """Of a schedule, in those without faults."""
    return FAULTED_COST if play.faults == ALL else 1


def played(shard: Shard, stop: Stop) -> Tally:
    """In a worker."""
    play = shard.play
    player = begin(_judged(play), 1 if play.whole else shard.schedules)
    search = STRATEGIES[play.strategy].make(shard.seed)
    return explore(player, search, shard.seed, shard.schedules, lambda _: stop())


def _judged(play: Play) -> Judged:
    return Judged(find, play.name, play.design, faults=faults_of(play.faults))


def repeats(play: Play, tally: Tally) -> list[str]:
    """A line each, which plays what its shard played until then, and stops at no failure before it."""
    judged = _judged(play)
    return [
        f"{found.result.invariant}: {repeat(judged, play.strategy, found, tally.found)}"
        for found in tally.found
    ]


@dataclass(slots=True)
class Sitting:
    """What came of this run, beside the rows."""

    rows: Rows
    stale: set[Play]  # whose rows go when there is something to put in their place
    schedules: int = 0
    repeats: list[str] = field(default_factory=list)
    errors: int = 0  # of ours: a shard that did not come to an end
    _written: float = field(default_factory=time.monotonic)

    def ended(self, shard: Shard, future: Future[Tally]) -> None:
        """BrokenProcessPool."""
        try:
            tally = future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:  # the others are hours of work
            self.errors += 1
            print(f"{shard}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            self._row(shard).broke(shard.seed, error)
            return
        lines = repeats(shard.play, tally)
        self._row(shard).add(shard.seed, tally.schedules, tally.traces, lines, tally.faulted)
        self.schedules += tally.schedules
        self.repeats += lines
        for line in lines:
            print(line, flush=True)
        if time.monotonic() - self._written > WRITES_S:
            self.rows.write()
            self._written = time.monotonic()

    def _row(self, shard: Shard) -> CleanRow:
        if shard.play in self.stale:
            self.rows.drop(shard.play)
            self.stale.remove(shard.play)
        return self.rows.of(shard.play, shard.seed)

    def told(self) -> str:
        errors = f"; {self.errors:,} shards ended in an error of ours" if self.errors else ""
        if not self.schedules:
            return f"{NOTHING_PLAYED}{errors}"
        broke = f"{len(self.repeats):,} failed" if self.repeats else "nothing broke"
        return f"{self.schedules:,} schedules: {broke}{errors}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make schedules", description="what holds when no bug is planted")
    parser.add_argument(
        "--story",
        "--stories",
        nargs="+",
        choices=tuple(STORIES),
        default=list(STORIES),
        metavar="S",
        help="small stories (all)",
    )
    parser.add_argument(
        "--design", nargs="+", choices=tuple(DESIGNS), default=[], help="to play them on (all they can be)"
    )
    parser.add_argument(
        "--schedules",
        type=none_or_more,
        default=SCHEDULES,
        metavar="N",
        help=f"of a story on a design, and a {FAULTED_COST}th of it with all faults ({SCHEDULES})",
    )
    parser.add_argument(
        "--seeds",
        type=none_or_more,
        default=SEEDS,
        metavar="N",
        help=f"of a scenario or workload, {SCHEDULES_OF_SHARD} schedules each ({SEEDS})",
    )
    seeded = [name for name, named in STRATEGIES.items() if named.seeded]
    parser.add_argument(
        "--strategy", choices=seeded, default=DEFAULT, help=f"what chooses schedules ({DEFAULT})"
    )
    parser.add_argument(
        "--faults",
        type=faults_of,
        metavar="KIND,...",
        help="at most one each in what is searched ('': none; without this, none and all)",
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="end after so many")
    parser.add_argument("--workers", type=one_or_more, metavar="N", help="processes (one a core)")
    parser.add_argument(
        "--again", action="store_true", help="from seed 0, in place of what is on record, of all sources"
    )
    parser.add_argument("--record", type=Path, default=CLEAN, metavar="FILE", help=str(CLEAN))
    return parser


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    if not given.schedules and not given.seeds:
        parser.error("--schedules 0 --seeds 0: nothing would be played, and nothing could break")
    kinds = ("", ALL) if given.faults is None else (",".join(given.faults),)
    try:
        plays = [
            play for faults in kinds for play in stories(given.story, given.design, given.strategy, faults)
        ]
    except NothingToPlay as nothing:
        parser.error(str(nothing))
    plays += scenarios(given.strategy, kinds[0]) if given.seeds else ()
    rows = Rows(given.record, version())
    plays.sort(key=lambda play: rows.schedules(play) * _cost(play))
    sitting = Sitting(rows, set(plays) if given.again else set())
    todo = shards(
        {play: 0 if given.again else rows.fresh(play) for play in plays}, given.schedules, given.seeds
    )
    until = time.monotonic() + given.seconds if given.seconds is not None else None
    with interrupts() as interrupted:

        def stop() -> bool:
            return interrupted() or (until is not None and time.monotonic() > until)

        print(f"{len(plays)} stories and scenarios by turns, of {rows.code}", file=sys.stderr, flush=True)
        for line in rows.errors:
            print(f"an error of ours is on record: {line}", file=sys.stderr, flush=True)
        try:
            status = _sat(sitting, todo, given.workers, stop)
        except KeyboardInterrupt:  # the second: what was under way was not waited for
            assert interrupted()
        if interrupted():
            print(f"interrupted: {given.record} has what was played", file=sys.stderr)
            status = EXIT_INTERRUPTED
    print(sitting.told())
    return status


def _sat(sitting: Sitting, todo: Iterator[Shard], workers: int | None, stop: Stop) -> int:
    died = False
    try:
        with closing(pooled(todo, played, workers, stop)) as ended:
            for one in ended:
                if one is not None:
                    sitting.ended(*one)
                if sys.stderr.isatty():
                    print(f"\r{sitting.schedules:,} schedules", end="", file=sys.stderr, flush=True)
    except BrokenProcessPool:
        died = True
        print(WORKER_DIED, file=sys.stderr)
    finally:
        sitting.rows.write()
    well = sitting.schedules and not (died or sitting.repeats or sitting.errors)
    return 0 if well else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
