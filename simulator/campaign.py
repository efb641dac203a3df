"""A campaign: many schedules of one story, on all cores, resumable.

A campaign is cut into shards, each the first schedules of the strategy with a seed of its own, so that what
a shard comes to does not depend on who ran it, or when.  Finished ones are lines of a file, on the disk
before another is begun in its place; a line that a crash tore is cut off at the next start, and its shard
run again.  A search that ends by itself (`Named.seeded`) is one shard: its order is its memory, nothing of
it can be left out.

Workers ignore Ctrl-C, which reaches everybody at a terminal: the campaign tells them to end the schedule
they run, and takes no unfinished shard.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from simulator.search.explore import Found, Player, PlayerLost, RunEnd, Tally, explore
from simulator.search.strategies import STRATEGIES

SHARD = 200
SHARD_FILE_FORMAT = 2
PROGRESS_S = 0.5

_Finished = tuple[int, Tally]
"""A shard's seed, and what it came to."""

Start = Callable[[], Player]
"""Called once in each process; may be sent to one (a function of a module, or a `partial` of one)."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """`story`: what one schedule runs, in words (scenario, design, plant); `code`: which sources run it."""

    story: str
    strategy: str
    schedules: int
    seed: int = 0
    code: str = ""
    shard: int = SHARD  # schedules of one

    def shards(self) -> Iterator[tuple[int, int]]:
        """Seed and schedules of each, if the strategy is seeded."""
        for number, start in enumerate(range(0, self.schedules, self.shard)):
            yield self.seed + number, min(self.shard, self.schedules - start)


class CampaignRefused(Exception):
    """The file is another campaign's, or a worker died; the message says what to do."""


@dataclass(slots=True)
class Progress:
    """`seconds`: of this sitting; `resumed`: schedules that earlier ones had run."""

    tally: Tally
    seconds: float
    resumed: int

    def line(self) -> str:
        tally = self.tally
        rate = (tally.schedules - self.resumed) / self.seconds if self.seconds else 0.0
        return (
            f"{tally.schedules:,} schedules, {rate:,.0f}/s, {len(tally.traces):,} traces, "
            f"{len(tally.covered):,} transitions and races, {len(tally.found):,} failed"
        )


@dataclass(frozen=True, slots=True)
class CampaignEnd:
    """`why`: "done", "found", "time" or "interrupted"."""

    tally: Tally
    why: str


# -- the file ----------------------------------------------------------------------------------------------


class ShardFile:
    """Finished shards by seed."""

    def __init__(self, path: Path, campaign: Campaign) -> None:
        """Raises CampaignRefused, and OSError."""
        self.shards: dict[int, Tally] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._read(path, {"format": SHARD_FILE_FORMAT, **asdict(campaign)})
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        lines = data[:whole].splitlines()
        if not lines:
            self._write(header)
            return
        try:
            found = json.loads(lines[0])
            differs = [name for name in header if found.get(name) != header[name]]
            if not differs:
                self.shards = dict(map(_from_line, lines[1:]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CampaignRefused(f"{path} is damaged ({error!r}): remove it, or name another file") from None
        if differs:
            was = ", ".join(f"{name} {found.get(name)!r}" for name in differs)
            raise CampaignRefused(f"{path} is of another campaign ({was}): remove it, or name another file")

    def add(self, seed: int, tally: Tally) -> None:
        self._write({"seed": seed, **_as_json(tally)})
        self.shards[seed] = tally

    def _write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("no room for a shard's line")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        os.close(self._file)


def _as_json(tally: Tally) -> dict[str, Any]:
    return {**asdict(tally), "traces": sorted(tally.traces), "covered": sorted(tally.covered)}


def _from_line(line: bytes) -> tuple[int, Tally]:
    value = json.loads(line)
    seed = value.pop("seed")
    found = [
        Found(
            **{
                **one,
                "result": RunEnd(*one["result"]),
                "answers": tuple(one["answers"]),
                "before": tuple(map(tuple, one["before"])),
            }
        )
        for one in value.pop("found")
    ]
    return seed, Tally(
        **{**value, "traces": set(value["traces"]), "covered": set(value["covered"])}, found=found
    )


# -- processes ---------------------------------------------------------------------------------------------


class _Event(Protocol):
    def is_set(self) -> bool: ...


_worker: tuple[Player, _Event] | None = None  # of this process, which is a worker


def _begin(start: Start, stop: _Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = start(), stop


def _shard(strategy: str, seed: int, schedules: int) -> Tally | None:
    """None: it was stopped."""
    assert _worker is not None
    player, stop = _worker
    tally = explore(player, STRATEGIES[strategy].make(seed), seed, schedules, lambda _: stop.is_set())
    return None if stop.is_set() else tally


def _pooled(
    campaign: Campaign, start: Start, known: Collection[int], workers: int
) -> Generator[_Finished | None]:
    """Shards as they end; None: some time has passed."""
    todo = (shard for shard in campaign.shards() if shard[0] not in known)
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin, (start, stop))
    running: dict[Future[Tally | None], int] = {}
    try:
        while True:
            for seed, schedules in islice(todo, 2 * workers - len(running)):
                running[pool.submit(_shard, campaign.strategy, seed, schedules)] = seed
            if not running:
                return
            ended, _ = wait(running, PROGRESS_S, FIRST_COMPLETED)
            for future in ended:
                tally = future.result()
                assert tally is not None, "nobody said stop"
                yield running.pop(future), tally
            if not ended:
                yield None
    except BrokenProcessPool:
        raise CampaignRefused(
            "a worker died: killed from outside, or out of memory.  What is finished is kept; run it again"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Has there been a Ctrl-C?  A second one does not wait for what is under way."""
    seen = False

    def handle(*_: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(slots=True)
class _Sitting:
    """When it is enough."""

    seconds: float | None
    failures_max: int | None
    progress: Callable[[Progress], None]
    interrupted: Callable[[], bool]
    resumed: int = 0
    began: float = field(default_factory=time.monotonic)
    why: str = ""  # it is over

    def enough(self, tally: Tally) -> bool:
        sofar = time.monotonic() - self.began
        self.progress(Progress(tally, sofar, self.resumed))
        if self.interrupted():
            self.why = "interrupted"
        elif self.failures_max is not None and len(tally.found) >= self.failures_max:
            self.why = "found"
        elif self.seconds is not None and sofar >= self.seconds:
            self.why = "time"
        return bool(self.why)


def _sharded(
    campaign: Campaign, start: Start, file: ShardFile | None, workers: int, sitting: _Sitting
) -> Tally:
    tally = Tally()
    for shard in file.shards.values() if file else ():
        tally.add(shard)
    sitting.resumed = tally.schedules
    with closing(_pooled(campaign, start, file.shards if file else (), workers)) as shards:
        for finished in shards:
            if finished is not None:
                if file:
                    file.add(*finished)
                tally.add(finished[1])
            if sitting.enough(tally):
                break
    tally.found.sort(key=lambda found: (found.seed, found.schedule))
    return tally


def run_campaign(
    campaign: Campaign,
    start: Start,
    *,
    path: Path | None = None,
    workers: int | None = None,
    seconds: float | None = None,
    failures_max: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> CampaignEnd:
    """`path`: where finished shards are kept, and found again; `workers`: one a core.

    From the main thread, which is the one that hears of Ctrl-C.  Raises CampaignRefused, and OSError.
    """
    named = STRATEGIES[campaign.strategy]
    with _interrupts() as interrupted, ExitStack() as stack:
        sitting = _Sitting(seconds, failures_max, progress, interrupted)
        if named.seeded:
            file = stack.enter_context(closing(ShardFile(path, campaign))) if path else None
            tally = _sharded(campaign, start, file, workers or os.cpu_count() or 1, sitting)
        else:
            strategy = named.make(campaign.seed)
            try:
                tally = explore(start(), strategy, campaign.seed, campaign.schedules, sitting.enough)
            except PlayerLost as lost:
                raise CampaignRefused(f"{lost}.  Run it again") from None
        return CampaignEnd(tally, sitting.why or "done")
