"""`make schedules`: all small stories on all designs, and all scenarios and workloads, with no bug planted.

Shares are equal: each story of a design has as many schedules as the others, each scenario as many seeds.
What is finished is kept beside the record, for these sources, and not run again.

    python -m simulator.clean --schedules N --seeds N --story S... --design D... --record FILE

Exit status: 0 nothing broke, 1 something did (with the line that repeats it), 2 the command was wrong, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.campaign import Campaign, CampaignEnd, Progress, run_campaign
from simulator.command import PLAYED, ROUNDS, SCHEDULES_OF_SHARD, begin, find
from simulator.hunting import version
from simulator.search.strategies import DEFAULT
from simulator.stories.library import STORIES
from simulator.world.schedule import Judged

CLEAN = Path("docs/results/clean.json")
KEPT = Path("build/schedules")
SCHEDULES, SEEDS = 40_000, 100


class CutShort(Exception):
    """By Ctrl-C; what is finished is kept."""


class NothingToPlay(LookupError):
    """A design would be said to hold without a schedule."""


@dataclass(slots=True)
class Sums:
    """Of one design's stories, or of one scenario."""

    schedules: int = 0
    traces: int = 0
    failed: int = 0
    repeats: list[str] = field(default_factory=list)

    def add(self, judged: Judged, end: CampaignEnd) -> None:
        tally = end.tally
        self.schedules += tally.schedules
        self.traces += len(tally.traces)
        self.failed += len(tally.found)
        self.repeats += [
            f"{found.result.invariant}: qemu-shim sim {judged.scenario} --design {judged.design} "
            f"--seed {found.seed} --schedules {found.schedule}"
            for found in tally.found
        ]


def played(judged: Judged, schedules: int, workers: int | None, code: str) -> CampaignEnd:
    """CutShort."""
    small = judged.scenario in STORIES
    shard = ROUNDS if small else SCHEDULES_OF_SHARD
    campaign = Campaign(judged.scenario, DEFAULT, schedules, code=code, shard=shard)
    KEPT.mkdir(parents=True, exist_ok=True)
    told = f"{judged.scenario} on {judged.design}"

    def progress(now: Progress) -> None:
        if sys.stderr.isatty():
            print(f"\r{told}: {now.line()}", end="", file=sys.stderr, flush=True)

    end = run_campaign(
        campaign,
        partial(begin, judged, ROUNDS if small else 1),
        path=KEPT / f"{judged.scenario}-{judged.design}-{schedules}-{code}.jsonl",
        workers=workers,
        progress=progress,
    )
    if end.why == "interrupted":
        raise CutShort
    print(f"{told}: {end.tally.schedules:,} schedules, {len(end.tally.found)} failed", file=sys.stderr)
    return end


def of_designs(
    designs: list[str], names: list[str], schedules: int, workers: int | None, code: str
) -> Iterator[dict[str, Any]]:
    for design in designs:
        stories = [name for name in names if design in STORIES[name].playable]
        if not stories:
            raise NothingToPlay(f"none of {', '.join(names)} can be played on {design}: name another story")
        sums = Sums()
        for name in stories:
            judged = Judged(find, name, design)
            sums.add(judged, played(judged, -(-schedules // len(stories)), workers, code))
        yield {"design": design, **_as_json(sums)}


def of_scenarios(seeds: int, workers: int | None, code: str) -> Iterator[dict[str, Any]]:
    """Each on the last of its designs, in the order of DESIGNS: `shared`, where that can play it."""
    whole: Mapping[str, Scenario] = {
        name: scenario for name, scenario in PLAYED.items() if isinstance(scenario, Scenario)
    }
    for name, scenario in whole.items():
        sums = Sums()
        judged = Judged(find, name, scenario.playable[-1])
        sums.add(judged, played(judged, seeds, workers, code))
        yield {"name": name, "design": judged.design, "seeds": sums.schedules, **_as_json(sums)}


def _as_json(sums: Sums) -> dict[str, Any]:
    return {
        "schedules": sums.schedules,
        "traces": sums.traces,
        "failed": sums.failed,
        "repeats": sums.repeats,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make schedules", description="what holds when no bug is planted")
    parser.add_argument("--schedules", type=int, default=SCHEDULES, metavar="N", help="of each design")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="of each scenario and workload")
    parser.add_argument("--story", nargs="+", choices=tuple(STORIES), default=list(STORIES))
    parser.add_argument("--design", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    parser.add_argument("--record", type=Path, default=CLEAN, metavar="FILE", help=str(CLEAN))
    given = parser.parse_args()
    code = version()
    try:
        designs = list(of_designs(given.design, given.story, given.schedules, given.workers, code))
        scenarios = list(of_scenarios(given.seeds, given.workers, code)) if given.seeds else []
    except NothingToPlay as nothing:
        parser.error(str(nothing))
    except CutShort:
        print(f"interrupted: {KEPT} has what is finished", file=sys.stderr)
        return EXIT_INTERRUPTED
    record = {"code": code, "python": platform.python_version(), "designs": designs, "scenarios": scenarios}
    given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    repeats = [line for each in (*designs, *scenarios) for line in each["repeats"]]
    print("\n".join(repeats) or f"{sum(each['schedules'] for each in designs):,} schedules: nothing broke")
    return EXIT_FAILED if repeats else 0


if __name__ == "__main__":
    sys.exit(main())
