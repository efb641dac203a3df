"""A campaign: many schedules of one story, on all cores.

A campaign is cut into shards, each the first schedules of the strategy with a seed of its own, so that what
a shard comes to does not depend on who ran it, or when.  A search that ends by itself (`Named.seeded`) is
one shard: its order is its memory, nothing of it can be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from simulator.pool import Stop, interrupts, pooled
from simulator.search.coverage import Coverage
from simulator.search.explore import PlayerLost, Start, Tally, explore
from simulator.search.strategies import STRATEGIES

SHARD = 200
WORKER_DIED = "a worker died: killed from outside, or out of memory.  Run it again"
NOTHING_PLAYED = "no schedule was played"


@dataclass(frozen=True, slots=True)
class Campaign:
    strategy: str
    schedules: int
    seed: int = 0
    shard: int = SHARD  # schedules of one

    def shards(self) -> Iterator[tuple[int, int]]:
        """Seed and schedules of each, if the strategy is seeded."""
        for number, start in enumerate(range(0, self.schedules, self.shard)):
            yield self.seed + number, min(self.shard, self.schedules - start)


class CampaignRefused(Exception):
    """A worker died; the message says what to do."""


@dataclass(slots=True)
class Progress:
    tally: Tally
    seconds: float

    def line(self) -> str:
        tally = self.tally
        rate = tally.schedules / self.seconds if self.seconds else 0.0
        return (
            f"{tally.schedules:,} schedules, {rate:,.0f}/s, {len(tally.traces):,} traces, "
            f"{len(tally.covered):,} transitions and races, {len(tally.found):,} failed"
        )


@dataclass(frozen=True, slots=True)
class CampaignEnd:
    """`why`: "done", "found", "time" or "interrupted"."""

    tally: Tally
    why: str


# -- processes ---------------------------------------------------------------------------------------------


def _shard(
    start: Start, strategy: str, failures_max: int | None, shard: tuple[int, int], stop: Stop
) -> Tally:
    """What it had, if it was stopped."""
    seed, schedules = shard

    def enough(tally: Tally) -> bool:
        return stop() or _is_enough(tally, failures_max)

    return explore(start(schedules), STRATEGIES[strategy].make(seed), seed, schedules, enough, Coverage())


def _is_enough(tally: Tally, failures_max: int | None) -> bool:
    return failures_max is not None and len(tally.found) >= failures_max


@dataclass(slots=True)
class _Sitting:
    """When it is enough."""

    seconds: float | None
    failures_max: int | None
    progress: Callable[[Progress], None]
    interrupted: Callable[[], bool]
    began: float = field(default_factory=time.monotonic)
    why: str = ""  # it is over

    def enough(self, tally: Tally) -> bool:
        if self.why:  # and what is under way is waited for
            return True
        sofar = time.monotonic() - self.began
        self.progress(Progress(tally, sofar))
        if self.interrupted():
            self.why = "interrupted"
        elif _is_enough(tally, self.failures_max):
            self.why = "found"
        elif self.seconds is not None and sofar >= self.seconds:
            self.why = "time"
        return bool(self.why)


def _sharded(campaign: Campaign, start: Start, workers: int | None, sitting: _Sitting) -> Tally:
    tally, summaries = Tally(), dict[int, str]()  # by seed
    do = partial(_shard, start, campaign.strategy, sitting.failures_max)
    with closing(pooled(campaign.shards(), do, workers, lambda: bool(sitting.why))) as ended:
        try:
            for one in ended:
                if one is not None:
                    finished = one[1].result()
                    tally.add(finished)
                    summaries[one[0][0]] = finished.summary
                sitting.enough(tally)
        except BrokenProcessPool:
            if not tally.found:
                raise CampaignRefused(WORKER_DIED) from None
    if summaries:
        seed, tally.summary = min(summaries.items())
        if len(summaries) > 1:
            tally.summary = f"seed {seed}, one of {len(summaries)}: {tally.summary}"
    tally.found.sort(key=lambda found: (found.seed, found.schedule))
    return tally


def run_campaign(
    campaign: Campaign,
    start: Start,
    *,
    workers: int | None = None,
    seconds: float | None = None,
    failures_max: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> CampaignEnd:
    """`start`: for each shard, in one of the processes; may be sent there (a module's function, or a
    `partial`).  `workers`: one a core.  From the main thread, which hears of Ctrl-C.  What is under way when
    it is enough ends with what it had.  CampaignRefused.
    """
    named = STRATEGIES[campaign.strategy]
    with interrupts() as interrupted:
        sitting = _Sitting(seconds, failures_max, progress, interrupted)
        if named.seeded:
            tally = _sharded(campaign, start, workers, sitting)
        else:
            strategy = named.make(campaign.seed)
            try:
                schedules = campaign.schedules
                tally = explore(
                    start(schedules), strategy, campaign.seed, schedules, sitting.enough, Coverage()
                )
            except PlayerLost as lost:
                raise CampaignRefused(f"{lost}.  Run it again") from None
        return CampaignEnd(tally, sitting.why or "done")
