"""A campaign on a toy, in processes: the same whoever runs it, and it ends when it is told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import pytest

from qemu_shim.vmm.interrupt import SIGNALS
from simulator import campaign
from simulator.campaign import SHARD, Campaign, CampaignRefused, Progress, run_campaign
from simulator.search.coverage import Coverage
from simulator.search.explore import Player, RunEnd, Tally, explore
from simulator.search.option import Strategy
from simulator.search.strategies import STRATEGIES
from tests.unit.simulator.search.toy import PROGRAMS, Anew, ToyMachine, play

PROGRAM, TRACES = PROGRAMS["store buffering"]
CAMPAIGN = Campaign("random", 5 * SHARD + 10, seed=3)


def both_saw_all(machine: ToyMachine) -> bool:
    return {("A", "y", 1), ("B", "x", 1)} <= set(machine.seen)


def start(_: int) -> Player:
    def run_one(strategy: Strategy) -> RunEnd:
        return RunEnd("T2", "both saw it") if play(PROGRAM, strategy, both_saw_all).failed else RunEnd()

    return Anew(run_one)


def dies(_: int) -> Player:
    def run_one(strategy: Strategy) -> RunEnd:
        os.kill(os.getpid(), signal.SIGKILL)
        return RunEnd()

    return Anew(run_one)


def fails_behind_some(_: int) -> Player:
    """The third and each that follows."""
    played = 0

    def run_one(strategy: Strategy) -> RunEnd:
        nonlocal played
        played += 1
        play(PROGRAM, strategy)
        return RunEnd("T2", "late") if played > 2 else RunEnd()

    return Anew(run_one)


def by_hand(campaign: Campaign) -> Tally:
    tally = Tally()
    for seed, schedules in campaign.shards():
        tally.add(
            explore(
                start(schedules),
                STRATEGIES[campaign.strategy].make(seed),
                seed,
                schedules,
                coverage=Coverage(),
            )
        )
    return replace(tally, summary="")


def test_a_campaign_is_the_same_whoever_runs_it() -> None:
    end = run_campaign(CAMPAIGN, start, workers=2)
    assert end.why == "done"
    assert replace(end.tally, summary="") == by_hand(CAMPAIGN)
    first = explore(start(SHARD), STRATEGIES[CAMPAIGN.strategy].make(CAMPAIGN.seed), CAMPAIGN.seed, SHARD)
    assert end.tally.summary == f"seed {CAMPAIGN.seed}, one of 6: {first.summary}"
    assert end.tally.schedules == CAMPAIGN.schedules
    assert end.tally.found


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_it_with_what_is_finished(number: signal.Signals) -> None:
    endless = replace(CAMPAIGN, schedules=10**9)
    told = 0

    def interrupt(progress: Progress) -> None:
        nonlocal told
        told += bool(progress.tally.schedules)
        if told == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    end = run_campaign(endless, start, workers=1, progress=interrupt)
    assert end.why == "interrupted"
    assert signal.getsignal(number) is before
    assert end.tally.schedules >= SHARD


def test_a_campaign_ends_with_the_first_failure_or_when_time_is_up() -> None:
    assert run_campaign(CAMPAIGN, start, workers=1, failures_max=1).why == "found"
    assert run_campaign(replace(CAMPAIGN, schedules=10**9), start, workers=1, seconds=0).why == "time"


ONE_SHARD = Campaign("random", 10**9, shard=10**9)


def test_time_that_is_up_loses_nothing_that_a_shard_under_way_had() -> None:
    end = run_campaign(ONE_SHARD, fails_behind_some, workers=1, seconds=3)
    assert end.why == "time"
    assert end.tally.found[0].schedule == 3
    assert len(end.tally.found) == end.tally.schedules - 2


def test_a_signal_loses_nothing_that_a_shard_under_way_had() -> None:
    told = 0

    def interrupt(progress: Progress) -> None:
        nonlocal told
        told += 1
        if told == 1:
            os.kill(os.getpid(), signal.SIGINT)

    end = run_campaign(ONE_SHARD, fails_behind_some, workers=1, progress=interrupt)
    assert end.why == "interrupted"
    assert end.tally.schedules


def test_a_shard_ends_with_the_failures_that_are_enough() -> None:
    end = run_campaign(ONE_SHARD, fails_behind_some, workers=1, failures_max=1)
    assert (end.why, end.tally.schedules, len(end.tally.found)) == ("found", 3, 1)


def test_what_was_found_is_kept_though_a_worker_dies_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(tasks: Iterable[Any], do: Callable[..., Tally], *_: object) -> Generator[Any]:
        """The pool, in this process; its second task ends it."""
        first, second, *_others = tasks
        well, died = Future[Tally](), Future[Tally]()
        well.set_result(do(first, lambda: False))
        died.set_exception(BrokenProcessPool())
        yield first, well
        yield second, died

    monkeypatch.setattr(campaign, "pooled", here)
    end = run_campaign(CAMPAIGN, fails_behind_some, failures_max=1)
    assert (end.why, len(end.tally.found)) == ("found", 1)


def test_a_worker_that_dies_ends_the_campaign_with_a_reason() -> None:
    with pytest.raises(CampaignRefused, match="a worker died"):
        run_campaign(CAMPAIGN, dies, workers=1)


def test_a_search_that_ends_is_one_shard_and_says_all() -> None:
    def well(_: int) -> Player:
        def run_one(strategy: Strategy) -> RunEnd:
            play(PROGRAM, strategy)
            return RunEnd()

        return Anew(run_one)

    end = run_campaign(Campaign("exhaustive", 10**9), well)
    assert (end.why, end.tally.over, end.tally.schedules) == ("done", True, TRACES)
    assert end.tally.summary.startswith(f"all {TRACES} inequivalent interleavings")
    end = run_campaign(Campaign("exhaustive", 10**9), well, seconds=0)
    assert (end.why, end.tally.over) == ("time", False)
    assert "all" not in end.tally.summary


def test_progress_says_what_it_has_come_to() -> None:
    tally = Tally(schedules=1234, traces={1, 2}, covered={5})
    assert Progress(tally, 2.0).line() == (
        "1,234 schedules, 617/s, 2 traces, 1 transitions and races, 0 failed"
    )
