"""Who serves waits where it is instead of by way of trio: the same steps, told by the whole journal."""

from __future__ import annotations

import pytest

from simulator.command import find
from simulator.kernel.process import SimPoller
from simulator.search.replay import Recorded
from simulator.search.strategies import STRATEGIES
from simulator.world.process import Io
from simulator.world.schedule import Judged
from tests.integration.simulator.digests import JournalKept

STORIES = ["fault", "discard", "asleep", "detach", "lend", "log", "importers"]
TURNS = 3  # of several rounds in one machine


def told(story: str, strategy: str) -> tuple[str, list[int]]:
    kept, answers = JournalKept(), []
    search = STRATEGIES[strategy].make(7)
    playing = Judged(find, story, "shared")(TURNS, kept)
    for _ in range(TURNS):
        recorded = Recorded(search)
        assert not playing(recorded).invariant
        answers.append(recorded.trace)
        search.ended(False)
    return kept.journal.digest, answers


@pytest.mark.parametrize("strategy", ["random", "pct"])
@pytest.mark.parametrize("story", STORIES)
def test_the_steps_are_the_same_by_way_of_trio(
    story: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = told(story, strategy)
    ways: list[bool] = []

    def by_trio(io: Io, poller: SimPoller) -> bool:
        ways.append(io.rests(poller) > 0)
        return False

    monkeypatch.setattr(Io, "parks", by_trio)
    assert told(story, strategy) == here
    assert any(ways)
