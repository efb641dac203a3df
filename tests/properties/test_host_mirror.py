"""No schedule of changes, faults, acks and sleeps gives a mirror an answer that is stale; planted bugs do."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.page import MappedPage
from protocol.units import Hva, size_of_level
from tests.planted.plugin import Plants
from tests.properties.mirrored import play


@pytest.mark.parametrize("seed", range(12))
def test_what_a_mirror_was_answered_is_what_the_process_has_until_it_acks(seed: int) -> None:
    play(seed)


@pytest.mark.parametrize("seed", range(8))
def test_mirrors_that_register_and_close_while_anything_changes_are_right_too(seed: int) -> None:
    done = play(seed, coming=True)
    assert done["register"] > 2
    assert done["close"] > 2


def plays(count: int, *, coming: bool = False) -> Counter[str]:
    return sum((play(seed, coming=coming) for seed in range(count)), Counter[str]())


def test_the_schedules_do_everything_often() -> None:
    done = plays(6)
    host = {"migrate", "swap_out", "merge", "numa_hint", "collapse", "split"}
    own = {"write", "read", "dontneed", "free", "mprotect", "mmap", "fork"}
    for what in host | own | {"fault", "look", "pin", "unpin"}:
        assert done[what] > 5, f"{what}: {done}"


# -- planted bugs ------------------------------------------------------------------------------------------


async def forgotten_unless_watched(self: Mirror, start: Hva, end: Hva) -> None:
    await start_told(self, start, end)
    if not self._watched[self._first(start) : self._first_from(end)]:
        self._changing[-1] = Hva(0), Hva(0)


def end_of_all(self: Mirror, start: Hva, end: Hva) -> None:
    end_told(self, *((start, end) if (start, end) in self._changing else (Hva(0), Hva(0))))


start_told, end_told = Mirror.invalidate_range_start, Mirror.invalidate_range_end
found_then: dict[Mirror, list[MappedPage]] = {}


async def faulted_and_kept(self: Mirror, start: Hva, end: Hva, *, write: bool, tally: object) -> None:
    pages = found_then[self] = []
    while start < end:
        pages.append(await self.mm.get_user_page(start, write=write))
        start = Hva(pages[-1].hva + size_of_level(pages[-1].level))


def answered_from_then(self: Mirror, start: Hva, end: Hva, *, write: bool) -> tuple[list[MappedPage], Hva]:
    return found_then[self], end


PLANTED = (
    "R4-mirror-not-awaited",
    "R1-mirror-answers-in-a-change",
    "R26-last-range-not-told",
    "a-pin-does-not-count",
)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str, plant: Plants) -> None:
    plant(bug)
    with pytest.raises(AssertionError, match=r"I[56]"):
        plays(12)


def test_a_change_is_not_forgotten_that_was_not_watched_when_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Mirror, "invalidate_range_start", forgotten_unless_watched)
    monkeypatch.setattr(Mirror, "invalidate_range_end", end_of_all)
    with pytest.raises(AssertionError, match=r"I[56]"):
        plays(12)


def test_what_was_found_is_not_answered_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug that is more than a line: pages are answered as they were when they were faulted in."""
    monkeypatch.setattr(Mirror, "_fault_in", faulted_and_kept)
    monkeypatch.setattr(Mirror, "_serving", answered_from_then)
    with pytest.raises(AssertionError, match=r"I[56]"):
        plays(12)


def test_a_pin_that_outlives_its_mirror_is_caught(plant: Plants) -> None:
    """A planted bug: it asks before it sleeps, and not again."""
    plant("pin-outlives-its-mirror")
    with pytest.raises(AssertionError, match=r"I6|pinned, frames"):
        plays(40, coming=True)
