"""What runs came to, as digests: every small story on every design, some scenarios, and a bug that is found.

`python -m tests.integration.simulator.digests` prints a line each, the same in any process that runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from simulator.command import find
from simulator.ghost.probes.watch import Watch
from simulator.search.causality import Fingerprint
from simulator.search.explore import Found, explore, smallest
from simulator.search.replay import Recorded
from simulator.search.walk import RandomWalk
from simulator.settle import settle
from simulator.stories.library import STORIES
from simulator.world.journal import Journal
from simulator.world.schedule import Judged
from tests.integration.simulator.drawn import SMALL, played

SEED = 5
FOUND = ("discard", "shared", "R7-no-device-tlb")  # story, design and bug of a failure that is told alike
STORY = "story"


class JournalKept:
    """Onlooker."""

    def __init__(self) -> None:
        self.journal = Journal()

    def sees(self, watch: Watch) -> None: ...


def story_digest(name: str, design: str) -> str:
    """Of one schedule: all that happened, and the trace that a story's file has."""
    recorded, told = Recorded(RandomWalk(SEED)), JournalKept()
    end = Judged(find, name, design)(onlooker=told)(recorded)
    assert not end.invariant, end
    journal = told.journal
    assert recorded.trace != Fingerprint().value, "nothing was searched"
    return f"{journal.digest} {journal.steps} {recorded.trace:016x}"


def scenario_digest(name: str) -> str:
    journal = Journal()
    done = played(name, SEED, journal)
    return f"{journal.digest} {journal.steps} {done.problems}"


def found() -> Found:
    """A failure as people are told it: the sentence, and what it was shrunk to."""
    story, design, plant = FOUND
    judged = Judged(find, story, design, plant=plant)
    tally = explore(judged(), RandomWalk(SEED), SEED, 20, lambda tally: bool(tally.found))
    small, _ = smallest(judged, tally.found[0])
    assert small is not None
    return small


def lines() -> Iterator[str]:
    for name, story in STORIES.items():
        for design in story.playable:
            yield f"{STORY} {name} {design} {story_digest(name, design)}"
    for name in SMALL:
        yield f"scenario {name} {scenario_digest(name)}"
    yield f"found {found()}"


def main() -> int:
    settle()
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
