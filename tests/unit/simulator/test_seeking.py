"""Schedules go to the pairs that come to the planted lines in traces that were not played before.

Stories are made up: what each schedule of one comes to is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from simulator import seeking
from simulator.faults.kinds import FAULTED_COST, FAULTS
from simulator.planted.hunt import Catch
from simulator.planted.met import meet, number_of
from simulator.search.explore import RunEnd
from simulator.search.option import Option, Search, Strategy
from simulator.search.story import from_text
from simulator.search.strategies import STRATEGIES

MANY = 1000
STEPS = [Option(actor, f"{actor} stores", frozenset()) for actor in ("a", "b")]


@dataclass(frozen=True)
class Made:
    """A story: does it come to the lines, or before its excerpt opens, or its machine when that is made; has
    it many traces, and which of its schedules fails first; its own faults.
    """

    meets: bool = True
    meets_before: bool = False
    machine_meets: bool = False
    varied: bool = True
    fails: int = MANY + 1
    fails_faulted: int = MANY + 1
    faults: Sequence[str] = ()


@dataclass
class Player:
    story: Made
    count: Callable[[], int]

    def __call__(self, strategy: Strategy) -> RunEnd:
        if self.story.meets_before:
            meet(number_of("X"))
        steps = [Option(f"a {taken}", "", frozenset()) for taken in range(20)]
        for step in steps if self.story.varied else ():
            if strategy.choose([step, *STEPS]):
                strategy.took(step)
        if self.story.meets:
            meet(number_of("X"))
        failed = self.count() >= self.story.fails
        return RunEnd("I5" if failed else "", over=failed)

    def finish(self) -> RunEnd:
        return RunEnd()

    def renew(self) -> None: ...


@pytest.fixture
def stories(monkeypatch: pytest.MonkeyPatch) -> dict[str, Made]:
    """To be filled in; `played`: how often each was."""
    made: dict[str, Made] = {}
    monkeypatch.setattr(seeking, "pairs", lambda: [(name, "shared") for name in made])
    monkeypatch.setattr(seeking, "STORIES", made)
    return made


@pytest.fixture
def played(stories: dict[str, Made], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted = Counter[str]()

    @dataclass(frozen=True)
    class Judged:
        find: object
        scenario: str
        design: str
        faults: Sequence[str] = ()
        seed: int = 1
        params: Mapping[str, int] = field(default_factory=dict)
        plant: str = ""

        def __call__(self, rounds: int) -> Player:
            story = stories[self.scenario]
            if story.machine_meets:
                meet(number_of("X"))
            return Player(replace(story, fails=story.fails_faulted) if self.faults else story, self.count)

        def count(self) -> int:
            name = f"{self.scenario} with faults" if self.faults else self.scenario
            counted[name] += 1
            return counted[name]

    monkeypatch.setattr(seeking, "Judged", Judged)
    return counted


def test_who_does_not_come_to_the_lines_is_asked_now_and_then(
    stories: dict[str, Made], played: Counter[str]
) -> None:
    stories |= {"elsewhere": Made(meets=False), "there": Made()}
    assert seeking.find("random", 0, MANY) is None
    assert played.total() == MANY
    assert seeking.FIRST_TURN < played["elsewhere"] < MANY / 20


def test_who_comes_there_before_its_excerpt_opens_is_asked_less(
    stories: dict[str, Made], played: Counter[str]
) -> None:
    stories |= {"before": Made(meets=False, meets_before=True), "within": Made()}
    assert seeking.find("random", 0, MANY) is None
    assert MANY / 40 < played["before"] < MANY / 10


def test_who_shows_nothing_new_is_asked_now_and_then(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"always the same": Made(varied=False), "varied": Made()}
    assert seeking.find("random", 0, MANY) is None
    assert seeking.FIRST_TURN < played["always the same"] < MANY / 20


def test_what_is_new_with_faults_may_be_known_without(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"always the same": Made(varied=False), "varied": Made()}
    seeking.find("random", 0, MANY)
    assert played["always the same with faults"] > seeking.FIRST_TURN


def test_equals_have_equal_shares(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {name: Made() for name in "abcd"}
    seeking.find("random", 0, MANY)
    shares = [played[name] for name in stories]
    assert max(shares) - min(shares) <= seeking.LONGEST_TURN
    assert all(seeking.FIRST_TURN <= played[f"{name} with faults"] < min(shares) for name in stories)


def test_no_pair_has_another_s_luck(
    stories: dict[str, Made], played: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stories |= {"one": Made(), "other": Made()}
    named, seeds = STRATEGIES["random"], list[int]()

    def make(seed: int) -> Search:
        seeds.append(seed)
        return named.make(seed)

    monkeypatch.setattr(seeking, "STRATEGIES", {"random": replace(named, make=make)})
    assert seeking.find("random", 7, MANY) is None
    assert seeds == [7, 8] * 2, "with faults, too"


def test_who_is_worth_nothing_to_begin_with_waits(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"not scouted": Made(), "scouted": Made()}
    seeking.find("random", 0, 40, lambda pair: float(pair[0] == "scouted"))
    assert set(played) == {"scouted", "scouted with faults"}


def test_a_story_with_faults_of_its_own_does_not_wait(stories: dict[str, Made], played: Counter[str]) -> None:
    """Scouting may have met none of them."""
    stories |= {"not scouted": Made(), "faulted": Made(faults=["hangup"]), "scouted": Made()}
    seeking.find("random", 0, 40, lambda pair: float(pair[0] == "scouted"))
    assert played["faulted"] >= seeking.FIRST_TURN
    assert not played["not scouted"]


def test_a_story_that_is_left_out_is_not_played(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"its own": Made(), "another": Made()}
    seeking.find("random", 0, 40, plays=lambda story: story != "its own")
    assert set(played) == {"another", "another with faults"}


def test_a_rare_one_is_found_all_the_same(stories: dict[str, Made], played: Counter[str]) -> None:
    """The lines were not come to when it was asked first."""
    stories |= {"not scouted": Made(fails=3), "scouted": Made()}
    found = seeking.find("random", 0, MANY, lambda pair: float(pair[0] == "scouted"))
    assert found is not None
    assert (found.invariant, found.story, found.design) == ("I5", "not scouted", "shared")


def test_what_only_faults_come_to_is_found_with_them(stories: dict[str, Made], played: Counter[str]) -> None:
    stories["one"] = Made(fails_faulted=2)
    found = seeking.find("random", 0, MANY)
    assert found is not None
    assert (found.story, found.faults) == ("one", ",".join(FAULTS))
    assert played["one"] >= FAULTED_COST, "it costs more, and comes later"


def test_schedules_of_all_pairs_count(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"first": Made(meets=False), "second": Made(fails=2)}
    expected = Catch("I5", seeking.FIRST_TURN + 2, 0, "second", "shared")
    assert seeking.find("random", 0, MANY) == expected


def test_how_short_a_story_can_be_is_not_said_of_one_that_was_not_shrunk(
    stories: dict[str, Made], played: Counter[str]
) -> None:
    stories["one"] = Made(fails=2)
    found = seeking.find("random", 0, MANY, replays=0)
    assert found == Catch("I5", 2, None, "one", "shared")
    assert played["one"] == 4, "two to find it, one for its sentence, one that comes to the planted lines"


def test_what_fails_elsewhere_is_no_find(stories: dict[str, Made], played: Counter[str]) -> None:
    stories |= {"elsewhere": Made(meets=False, fails=2), "there": Made()}
    with pytest.raises(seeking.CleanCodeFails) as fails:
        seeking.find("random", 0, MANY)
    assert str(fails.value).startswith("I5: ")
    story = from_text(str(fails.value))
    assert (story.scenario, story.design, story.plant, story.invariant) == ("elsewhere", "shared", "", "I5")


def test_what_fails_with_nothing_planted_ends_the_scouting(
    stories: dict[str, Made], played: Counter[str]
) -> None:
    stories |= {"right": Made(), "wrong": Made(fails=seeking.SCOUTED)}
    with pytest.raises(seeking.CleanCodeFails) as fails:
        seeking.scouted([])
    assert from_text(str(fails.value)).scenario == "wrong"


def test_what_a_machine_came_to_when_it_was_made_counts(
    stories: dict[str, Made], played: Counter[str]
) -> None:
    stories["made wrong"] = Made(meets=False, machine_meets=True, fails=2)
    found = seeking.find("random", 0, MANY)
    assert found is not None
    assert found.story == "made wrong"


def test_it_is_stopped_behind_a_schedule(stories: dict[str, Made], played: Counter[str]) -> None:
    stories["first"] = Made()
    assert seeking.find("random", 0, MANY, stop=lambda: played.total() == 7) is None
    assert played.total() == 7
