"""The small stories hold on every design, and each of these mistakes breaks one of them."""

from __future__ import annotations

import pytest

from simulator.command import find
from simulator.search.explore import Tally, explore
from simulator.search.strategies import STRATEGIES
from simulator.stories.library import STORIES
from simulator.world.schedule import Judged

FEW, ENOUGH, ROUNDS = 2, 40, 20


def played(story: str, design: str, schedules: int, plant: str = "") -> Tally:
    """Until the first that fails."""
    player = Judged(find, story, design, plant=plant)(ROUNDS)
    return explore(player, STRATEGIES["random"].make(1), 1, schedules, lambda tally: bool(tally.found))


PAIRS = [(story.name, design) for story in STORIES.values() for design in story.playable]


@pytest.mark.parametrize(("story", "design"), PAIRS)
def test_a_story_holds_in_whatever_order(story: str, design: str) -> None:
    tally = played(story, design, FEW)
    assert tally.found == []
    assert len(tally.traces) == FEW, "two schedules, two traces"


@pytest.mark.parametrize(
    ("plant", "story", "invariants"),
    [
        ("R4-acks-not-awaited", "discard", {"R17", "I6"}),
        ("R4-notifiers-not-awaited", "migrate", {"I11", "I6"}),
        ("R7-no-device-tlb", "discard", {"I9"}),
        ("I9-not-waited-for", "migrate", {"I9"}),
    ],
)
def test_a_mistake_breaks_a_story(plant: str, story: str, invariants: set[str]) -> None:
    (found,) = played(story, "shared", ENOUGH, plant).found
    assert found.result.invariant in invariants, found.result
