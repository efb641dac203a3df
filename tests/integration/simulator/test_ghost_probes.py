"""The ghost's seams are where the product has them, and stories come to every one of them."""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from contextlib import closing
from typing import Any

import pytest

from simulator.command import find
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import SEAMS, watching, wrapping
from simulator.ghost.violation import Verdicts
from simulator.planted.plant import function_at
from simulator.search.explore import explore
from simulator.search.strategies import STRATEGIES
from simulator.world.schedule import Judged
from simulator.world.system import clear_away


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_each_seam_is_a_method_of_its_own_class(seam: tuple[type, str]) -> None:
    owner, name = seam
    assert inspect.isfunction(inspect.unwrap(vars(owner)[name]))


# Stories, designs and kinds of faults that together come to all seams.
PLAYED = (
    ("pin", "mirror", ()),
    ("age", "mirror", ()),
    ("convert", "managed", ()),
    ("never", "pinned", ()),
    ("pin-slot", "managed", ()),
    ("kvm-dies", "mirror", ()),
    ("export", "managed", ()),
    ("importers-end", "shared", ()),
    ("full", "shared", ()),
    ("shown-twice", "pinned", ()),
    ("slot-emulated", "shared", ()),
    ("log-huge", "shared", ()),
    ("ring", "shared", ()),
    ("detach", "shared", ("hangup",)),
    ("remap", "shared", ()),
    ("heir", "shared", ()),
)
SCHEDULES = 10


def test_the_ghost_hears_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted beneath the probes and within them: nothing of the product has a way around them."""
    made: Counter[tuple[type, str]] = Counter()
    heard: Counter[tuple[type, str]] = Counter()
    for seam, around in list(SEAMS.items()):
        original = vars(seam[0])[seam[1]]
        monkeypatch.setattr(*seam, _counted(made, seam, original))
        monkeypatch.setitem(SEAMS, seam, _counted(heard, seam, around))
    for story, design, faults in PLAYED:
        run_one = Judged(find, story, design, faults=faults)(SCHEDULES)
        found = explore(run_one, STRATEGIES["random"].make(1), 1, SCHEDULES).found
        del run_one  # it holds the seams wrapped, and what is raised below would hold it
        assert found == []
    assert made == heard
    assert set(SEAMS) == set(made)


def _counted(counts: Counter[tuple[type, str]], seam: tuple[type, str], call: Any) -> Any:
    def counting(*args: Any, **named: Any) -> Any:
        counts[seam] += 1
        return call(*args, **named)

    return counting


def test_the_product_is_as_it_was_when_nobody_watches_any_more() -> None:
    before = {seam: vars(seam[0])[seam[1]] for seam in SEAMS}
    with watching(Ghost(Verdicts())):
        assert all(vars(owner)[name] is not was for (owner, name), was in before.items())
    assert {seam: vars(seam[0])[seam[1]] for seam in SEAMS} == before


def test_a_player_wraps_the_seams_once_for_all_its_machines() -> None:
    before = {seam: vars(seam[0])[seam[1]] for seam in SEAMS}
    player, strategy = Judged(find, "discard", "shared")(1), STRATEGIES["random"].make(1)
    assert player(strategy).over
    between = {seam: vars(seam[0])[seam[1]] for seam in SEAMS}
    assert all(between[seam] is not was for seam, was in before.items())
    assert player(strategy).over
    assert {seam: vars(seam[0])[seam[1]] for seam in SEAMS} == between
    del player
    assert {seam: vars(seam[0])[seam[1]] for seam in SEAMS} == before


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_a_plant_is_put_into_what_is_wrapped(seam: tuple[type, str]) -> None:
    owner, name = seam
    where = f"{owner.__module__}:{owner.__qualname__}.{name}"
    function = function_at(where)
    with closing(wrapping()) as wraps:
        next(wraps)
        assert function_at(where) is function
    assert function_at(where) is function


@pytest.mark.parametrize("faults", [(), ("sigkill",)])
def test_a_player_that_is_dropped_takes_its_machine_along(faults: tuple[str, ...]) -> None:
    before = {seam: vars(seam[0])[seam[1]] for seam in SEAMS}
    player = Judged(find, "discard", "shared", faults=faults)(SCHEDULES)
    assert not player(STRATEGIES["random"].make(1)).over
    assert not gc.isenabled()
    del player
    assert gc.isenabled()
    clear_away()  # or what was cut off complains when the tests are over
    assert {seam: vars(seam[0])[seam[1]] for seam in SEAMS} == before
