"""The unchanged daemons and scenarios in one interpreter, under schedules that are chosen and come again."""

from __future__ import annotations

import os
import sys
from subprocess import run

import pytest

from tests.integration.simulator.drawn import SMALL, played


@pytest.mark.parametrize("scenario", SMALL)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_scenario_is_right_under_any_schedule(scenario: str, seed: int | None) -> None:
    """`check_system` asks all three daemons at the end; what they counted goes by the scenario."""
    done = played(scenario, seed)
    assert done.problems == []
    assert done.run is not None
    assert not done.report.ended
    assert done.decisions > 100, "there is something to choose"


def test_seeds_differ() -> None:
    assert len({played("sharing", seed).digest for seed in range(6)}) == 6


def test_the_same_seed_is_the_same_run_in_another_process_with_other_hashes() -> None:
    """Sets and dicts of strings are iterated in another order there, addresses are others."""

    def told(hash_seed: str) -> str:
        return run(
            [sys.executable, "-m", "tests.integration.simulator.drawn", "unmap", "5"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = told("0")
    assert first.endswith(" []\n")
    assert told("77") == first
    here = played("unmap", 5)
    assert first.split()[0] == here.digest


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
