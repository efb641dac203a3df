"""The unchanged daemons and scenarios in one interpreter, under schedules that are chosen and come again."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest

from qemu_shim.api import PAGE_SIZE, Context, Scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import DESIGNS, SHARED
from simulator.search.excerpt import Excerpt
from simulator.search.option import Option
from simulator.search.replay import Replay
from simulator.stories.library import STORIES
from simulator.world.journal import Journal
from simulator.world.system import play
from tests.integration.simulator.drawn import SMALL, Drawn, played


@pytest.mark.parametrize("scenario", SMALL)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_scenario_is_right_under_any_schedule(scenario: str, seed: int | None) -> None:
    """`check_system` asks all three daemons at the end; what they counted goes by the scenario."""
    done = played(scenario, seed)
    assert done.problems == []
    assert done.run is not None
    assert not done.report.ended
    assert done.decisions > 100, "there is something to choose"


@pytest.mark.parametrize(("story", "design"), [("fault", "shared"), ("log", "pinned"), ("merge", "mirror")])
def test_a_story_of_which_nothing_is_searched_is_that_which_is_always_answered_by_default(
    story: str, design: str
) -> None:
    journals = []
    for strategy in (Replay(()), Excerpt(Replay(()))):
        journals.append(Journal(keep=True))
        done = play(
            STORIES[story].scenario(Excerpt(Replay(()))), DESIGNS[design], strategy, journal=journals[-1]
        )
        assert done.problems == []
    assert journals[0].lines == journals[1].lines


def test_seeds_differ() -> None:
    journals = [Journal() for _ in range(6)]
    for seed, journal in enumerate(journals):
        played("sharing", seed, journal)
    assert len({journal.digest for journal in journals}) == 6


def test_a_run_leaves_no_thread_of_trio_and_no_hook_behind() -> None:
    """Whoever runs trio in this interpreter afterwards finds it as it was."""
    import trio
    from trio._core import _run

    before = _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING, sys.get_asyncgen_hooks()
    played("sharing", 1)
    assert (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING, sys.get_asyncgen_hooks()) == before

    async def still() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    assert not trio.lowlevel.in_trio_run()
    assert trio.run(still) == 7


def test_who_ends_with_an_fd_open_is_named() -> None:
    async def keeps_a_file(ctx: Context) -> None:
        guest = await ctx.boot_for(4)
        await guest.machine.process.memfd("kept", PAGE_SIZE)

    done = play(Scenario(name="keeps", summary="", play=keeps_a_file), SHARED, Replay(()))
    (why,) = done.problems
    assert re.fullmatch(r"I14: qemu_shim has ended, and has fds open: \d+ \(kvmd\.pair\d+'\)", why)


class KvmdInWalks(Drawn):
    """kvmd goes on only while the unit is about to load an entry of a lower table, or nobody else can."""

    def choose(self, options: Sequence[Option]) -> int:
        walks = any(
            option.actor == "device_sim"
            and option.label.startswith("loads kvmd.tdp-tables")
            and not option.label.endswith("[0]")
            for option in options
        )
        for n, option in enumerate(options):
            if option.actor.startswith("kvmd") == walks:
                return n
        return super().choose(options)


def test_a_walk_stands_still_between_two_levels_while_kvmd_stores() -> None:
    """The unit reads an entry, kvmd changes the table, the unit reads on in the same walk."""
    journal = Journal(keep=True)
    done = play(SCENARIOS["unmap"], SHARED, KvmdInWalks(1), params=SMALL["unmap"], journal=journal)
    assert done.problems == []
    assert journal.lines is not None
    told = [line.replace(":", "").split() for line in journal.lines]
    on_tables = [
        (who, what, int(word.partition("[")[2][:-1]) // 512)
        for who, what, word in (line for line in told if len(line) == 3)
        if what in ("loads", "stores") and word.startswith("kvmd.tdp-tables")
    ]
    loads = [n for n, (who, what, _) in enumerate(on_tables) if (who, what) == ("device_sim", "loads")]
    root = on_tables[loads[0]][2]
    stopped = [
        on_tables[before : after + 1]
        for before, after in pairwise(loads)
        if on_tables[after][2] != root
        and any(access[:2] == ("kvmd", "stores") for access in on_tables[before:after])
    ]
    assert stopped, "no store between two loads of one walk"
