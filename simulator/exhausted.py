"""`make exhausted`: every interleaving of the stories that are small enough for it, on every design.

    python -m simulator.exhausted [--story S...] [--design D...] [--faults KIND[:each],...] [--seconds N]
                                  [--plant ID...] [--record FILE]

With faults an interleaving has at most one of a kind, and behind it all is played once more without.  KIND is
drawn first of all: at which of so many opportunities.  KIND:each is asked at each of them, which ends sooner:
none is drawn that never comes, and opportunities may change places, but with the one that is taken.

Results are put on record one by one, in docs/results/exhaustive.json; one of the same sources is not searched
for again, unless it did not end and there is more time for it now.  The record is JSON:

    {"command": how it was made,
     "searches": [{"story", "design", "faults": "kind,kind" or "", "code": of which sources (git), "ended":
                   has every interleaving been played?, "interleavings", "pruned": runs given up, as they
                   are played elsewhere, "states": nodes of the tree that all runs make, which is its steps
                   and 1 (two that differ by how they came about are two), "left": known of and not played,
                   0 if it ended, "failed": of all runs, "faulted": interleavings in which a fault struck,
                   "seconds"}],
     "plants": [{"plant", "code", "story", "design", "faults": likewise, "invariant", "run": the first that
                 shows it}]}

`plants`: of each planted bug that was sought, the first of the searches asked for that finds it: by an
invariant that it belongs to, in a run that comes to its lines.  Another failure is told, and ends the search.

Exit status: 0 all ended, and nothing failed, or each bug was found; 1 not; 2 the command was wrong; 130
interrupted, and what is on record stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qemu_shim.study.campaign.store import write_whole
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.command import find as story_of
from simulator.command import searched_faults
from simulator.faults.kinds import EACH, FAULTS, drawn_among
from simulator.options import NothingToPlay, playable
from simulator.planted.belongs import invariants_of
from simulator.planted.registry import PLANTED
from simulator.pool import interrupts
from simulator.search.exhaustive import Exhaustive
from simulator.search.explore import Found, Tally, explore
from simulator.seeking import comes_to_the_plant
from simulator.settle import settle
from simulator.stories.at_once import AT_ONCE
from simulator.version import version
from simulator.world.forked import Forked
from simulator.world.schedule import Judged

EXHAUSTED = Path("docs/results/exhaustive.json")
SECONDS_EACH = 600.0  # of one search
SMALL_ENOUGH = [story.name for story in AT_ONCE]

Pair = tuple[str, str]
"""Story and design."""

EPILOG = (
    f"Kinds of faults: {'; '.join(f'{name}: {kind.what}' for name, kind in FAULTS.items() if kind.searched)}."
    f" KIND is drawn first of all: at which of so many opportunities. KIND{EACH} is asked at each of them."
    " What does not end in time says how many interleavings were played, and at least how many are left."
)


class OnRecord:
    """What has been found, in a file."""

    def __init__(self, path: Path, code: str) -> None:
        self._path = path
        self.code = code
        self.kept: dict[str, Any] = {"command": "make exhausted", "searches": [], "plants": []}
        if path.exists():
            self.kept = json.loads(path.read_text(encoding="utf-8"))

    def get(self, kind: str, **key: str) -> dict[str, Any] | None:
        """Of the same sources."""
        key["code"] = self.code
        found = (one for one in self.kept[kind] if all(one[name] == key[name] for name in key))
        return next(found, None)

    def put(self, kind: str, names: Sequence[str], one: dict[str, Any]) -> None:
        """In place of what there was under these `names` of it."""
        others = [other for other in self.kept[kind] if any(other[name] != one[name] for name in names)]
        self.kept[kind] = sorted([*others, one], key=lambda each: [each[name] for name in names])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, f"{json.dumps(self.kept, indent=1)}\n".encode())


def searched(
    pair: Pair,
    plant: str = "",
    enough: Callable[[Tally], bool] = lambda tally: False,
    faults: Sequence[str] = (),
) -> tuple[Exhaustive, Tally]:
    story, design = pair
    search = Exhaustive()
    player = Forked(Judged(story_of, story, design, plant=plant, faults=faults))
    return search, explore(player, search, 0, sys.maxsize, enough)


def of_clean_code(
    pair: Pair, record: OnRecord, seconds: float, tell: Callable[[str], None], faults: Sequence[str] = ()
) -> dict[str, Any]:
    """One of `searches`."""
    story, design = pair
    kinds = ",".join(faults)
    kept = record.get("searches", story=story, design=design, faults=kinds)
    if kept and (kept["ended"] or kept["seconds"] >= seconds):
        return kept
    began = time.monotonic()

    def enough(tally: Tally) -> bool:
        sofar = time.monotonic() - began
        tell(f"{story} {design} {kinds}: {tally.schedules} interleavings in {sofar:.0f} s")
        return sofar > seconds

    search, tally = searched(pair, enough=enough, faults=faults)
    for first in tally.found[:1]:
        how = f" --faults {kinds}" if kinds else ""
        print(
            f"{first.result.invariant}: {first.result.sentence}\nqemu-shim sim {story} --design {design}"
            f" --strategy exhaustive --schedules {first.schedule}{how}"
        )
    found = {
        "story": story,
        "design": design,
        "faults": kinds,
        "code": record.code,
        "ended": tally.over,
        "interleavings": search.traces,
        "pruned": search.pruned,
        "states": search.transitions + 1,
        "left": 0 if tally.over else search.left(),
        "failed": len(tally.found),
        "faulted": tally.faulted,
        "seconds": round(time.monotonic() - began),
    }
    record.put("searches", ("story", "design", "faults"), found)
    return found


def of_planted(
    plant: str,
    over: Sequence[Pair],
    record: OnRecord,
    seconds: float,
    faults: Sequence[Sequence[str]] = ((),),
) -> dict[str, Any] | None:
    """One of `plants`; at most so many seconds a search, of which there is one for each of `faults`."""
    asked = [(pair, kinds) for kinds in faults for pair in over]
    for (story, design), kinds in asked:
        if kept := record.get("plants", plant=plant, story=story, design=design, faults=",".join(kinds)):
            return kept
    for (story, design), kinds in asked:
        until = time.monotonic() + seconds
        _, tally = searched((story, design), plant, partial(_found_or_late, until), kinds)
        if tally.found:
            first = tally.found[0]
            if other := _not_found(plant, Judged(story_of, story, design, plant=plant, faults=kinds), first):
                print(f"{plant}: {other}", flush=True)
                return None
            found = {
                "plant": plant,
                "code": record.code,
                "story": story,
                "design": design,
                "faults": ",".join(kinds),
                "invariant": first.result.invariant,
                "run": first.schedule,
            }
            record.put("plants", ("plant", "story", "design", "faults"), found)
            return found
    return None


def _not_found(plant: str, judged: Judged, first: Found) -> str:
    """Why what failed is not what was sought; empty: it is."""
    end = first.result
    where = f"{end.invariant} in run {first.schedule} of {judged.scenario} on {judged.design}"
    if not comes_to_the_plant(judged, first):
        return f"{where}, which comes to no planted line: the clean code fails: {end.sentence}"
    if end.invariant not in invariants_of(PLANTED[plant]):
        return f"{where}, to which it does not belong: {end.sentence}"
    return ""


def _found_or_late(until: float, tally: Tally) -> bool:
    return bool(tally.found) or time.monotonic() > until


def told(found: dict[str, Any]) -> str:
    """A search, as people are told of it."""
    counts = (
        f"{found['interleavings']:,} inequivalent interleavings, {found['states']:,} nodes, "
        f"{found['pruned']:,} pruned, {found['failed']:,} failed, {found['seconds']} s"
    )
    left = "" if found["ended"] else f", at least {found['left']} left"
    what = " ".join(filter(None, (found["story"], found["design"], drawn_among(found["faults"]))))
    return f"{what}: {'all ' if found['ended'] else ''}{counts}{left}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make exhausted", description="every interleaving of small stories", epilog=EPILOG
    )
    parser.add_argument(
        "--story", nargs="+", choices=SMALL_ENOUGH, default=SMALL_ENOUGH, help="small stories (all these)"
    )
    parser.add_argument(
        "--design", nargs="+", choices=tuple(DESIGNS), default=[], help="to play them on (all they can be)"
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        type=searched_faults,
        default=[()],
        metavar="KIND[:each],...",
        help="a search for each of these: at most one fault of each kind (none)",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS_EACH, metavar="N", help="of a search (600)")
    parser.add_argument(
        "--plant",
        nargs="+",
        choices=tuple(PLANTED),
        default=[],
        metavar="ID",
        help="seek these bugs, each put in (none: nothing is to fail)",
    )
    parser.add_argument("--record", type=Path, default=EXHAUSTED, metavar="FILE", help=str(EXHAUSTED))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        over = playable(given.story, given.design)
    except NothingToPlay as nothing:
        parser.error(str(nothing))
    settle()
    record = OnRecord(given.record, version())
    try:
        with interrupts(at_once=True):
            if given.plant:
                return _seek(given.plant, over, record, given.seconds, given.faults)
            return _search(over, given.faults, record, given.seconds)
    except KeyboardInterrupt:
        print(f"interrupted: {given.record} has what was found", file=sys.stderr)
        return EXIT_INTERRUPTED


def _search(over: Sequence[Pair], faults: Sequence[Sequence[str]], record: OnRecord, seconds: float) -> int:
    well = True
    tell = _show if sys.stderr.isatty() else lambda line: None
    for kinds in faults:
        for pair in over:
            found = of_clean_code(pair, record, seconds, tell, kinds)
            print(told(found), flush=True)
            well = well and found["ended"] and not found["failed"]
    return 0 if well else EXIT_FAILED


def _seek(
    plants: Sequence[str],
    over: Sequence[Pair],
    record: OnRecord,
    seconds: float,
    faults: Sequence[Sequence[str]],
) -> int:
    missed = 0
    for plant in plants:
        found = of_planted(plant, over, record, seconds, faults)
        missed += found is None
        where = "{invariant} in run {run} of {story} on {design} {faults}"
        print(f"{plant}: {'not found' if found is None else where.format(**found).rstrip()}", flush=True)
    return EXIT_FAILED if missed else 0


def _show(line: str) -> None:
    print(f"\r{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
