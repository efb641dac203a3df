"""By which invariants a planted bug counts as found: what the page of invariants says, and no more."""

from __future__ import annotations

import pytest

from simulator.planted.belongs import HELD_AS, invariants_of
from simulator.planted.hunt import Catch, Hunted, RangeEnd
from simulator.planted.registry import PLANTED
from tests.tidy.test_architecture import NUMBER, rows


def test_who_is_held_as_another_is_held_as_the_page_says() -> None:
    told = {number: NUMBER.findall(cells[2] + cells[3]) for number, cells in (rows("R") | rows("I")).items()}
    assert {number: sorted(named) for number, named in HELD_AS.items()} == {
        number: sorted(set(named)) for number, named in told.items() if named
    }


@pytest.mark.parametrize("name", PLANTED)
def test_a_plant_belongs_to_few(name: str) -> None:
    plant = PLANTED[name]
    belongs = invariants_of(plant)
    assert plant.invariant in belongs
    named = {plant.invariant, *plant.races}
    assert all(
        number in named or any(number in HELD_AS.get(race, ()) for race in named) for number in belongs
    )
    assert len(belongs) <= 6, "whatever is found would be right"


@pytest.mark.parametrize("by", ["check", "stuck", "I25", "R21"])
def test_what_is_found_by_another_number_is_not_found(by: str) -> None:
    def found(*invariants: str) -> Hunted:
        catches = (Catch(invariant, 1, 1, "migrate", "shared") for invariant in invariants)
        return Hunted(
            PLANTED["R4-acks-not-awaited"], "random", [RangeEnd(catch, 1, 0, "v1") for catch in catches]
        )

    assert found("I6", "R17").is_right
    assert not found("I6", by).is_right
