"""`python -m tests.torture`: the same stories on four real processes, one of which is struck at each call.

Exit status: 0 nobody failed; 1 somebody did, and for each a line that repeats it; 2 the command was wrong;
130 interrupted.  The record lets the same command go on where it was left.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import structlog
import trio

from tests.torture.blow import PROCESSES, START, Aftermath, Blow, How
from tests.torture.calls import FAULTS
from tests.torture.daemons import Spawner
from tests.torture.record import OtherCode, TriedBlows, as_dict, table
from tests.torture.stories import STORIES
from tests.torture.summary import ended_of, rows_of, summary
from tests.torture.sweep import Bounds, StruckSystem, Sweep, clean_up, run, sweeps

RECORD = Path("torture.jsonl")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--story", action="append", choices=[START, *STORIES], default=[])
    parser.add_argument("--process", action="append", choices=PROCESSES, default=[])
    parser.add_argument("--kind", action="append", choices=FAULTS, default=[])
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="N", help="the first call (1)")
    parser.add_argument("--to", type=int, dest="last", metavar="N", help="the last")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="each K-th call (1)")
    parser.add_argument("--most", type=int, metavar="M", help="at most M blows of a story, process and kind")
    parser.add_argument("--record", type=Path, default=RECORD, help=f"what was tried ({RECORD})")
    parser.add_argument("--no-record", action="store_true", help="keep nothing")
    parser.add_argument(
        "--summary",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="in JSON, of these, oldest first",
    )
    parser.add_argument(
        "--known",
        type=_summary,
        metavar="JSON",
        help="a summary of other runs: what it has ended is not begun again, and a new one goes on from it",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON a blow, on standard output")
    options = parser.parse_args(argv)
    if min(options.first, options.every) < 1:
        parser.error("--from and --every count from 1")
    return options


def again(blow: Blow) -> str:
    where = f"--story {blow.story} --process {blow.victim} --kind {blow.fault.kind}"
    return f"python -m tests.torture {where} --from {blow.at} --to {blow.at} --no-record"


def _summary(path: str) -> Any:
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        rows_of(written)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path} is no --summary: {error}") from None
    return written


class Progress:
    """A line a blow, to whom it may concern."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._blows = 0
        self._since = time.monotonic()
        self._shown = sys.stderr.isatty()

    def __call__(self, blow: Blow, outcome: Aftermath) -> None:
        self._blows += 1
        if self._as_json:
            print(json.dumps(as_dict(blow, outcome)), flush=True)
        if self._shown or outcome.how is How.FAILED:
            rate = self._blows / (time.monotonic() - self._since + 1e-9)
            where = f"{blow.story} {blow.victim} {blow.fault.kind} {blow.at} {outcome.call or 'the end'}"
            end = "\n" if outcome.how is How.FAILED or not self._shown else "\r"
            line = f"{self._blows} blows, {rate:.1f}/s: {where}: {outcome.how} {outcome.why[:600]}"
            print(line if end == "\n" else f"\x1b[K{line[:120]}", end=end, file=sys.stderr, flush=True)


async def torture(options: argparse.Namespace, record: TriedBlows, world: StruckSystem) -> set[Sweep]:
    """The sweeps that were asked for."""
    bounds = Bounds(options.first, options.every, options.last, options.most)
    progress = Progress(as_json=options.json)
    known = ended_of(options.known) if options.known else set()
    asked = list(sweeps(options.story, options.process, [FAULTS[kind] for kind in options.kind]))
    for sweep in asked:
        if sweep in known:
            continue
        await run(sweep, bounds, world, record, progress)
    return set(asked)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.summary:
        print(json.dumps(summary(options.summary, options.known), indent=1))
        return 0
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        record = TriedBlows(None if options.no_record else options.record)
    except OtherCode as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    spawner = Spawner()
    world = StruckSystem(spawner)
    status = 0
    try:
        trio.run(torture, options, record, world)
        bad = {name: status for name, status in world.end().items() if status}
        if bad:
            print(f"torture: at the end daemons met bugs: {bad}", file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        print("torture: interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        clean_up(world, spawner)
    failed = {blow: outcome for blow, outcome in record.tried.items() if outcome.how is How.FAILED}
    print(table(record.tried), file=sys.stderr if options.json else sys.stdout)
    for blow, outcome in failed.items():
        print(f"failed: {outcome.why[:1000]}\n  again: {again(blow)}", file=sys.stderr)
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(main())
