"""Every life cycle of the product: its table is whole, what is not in it is refused, its picture is true."""

from __future__ import annotations

from enum import Enum, auto
from itertools import product
from typing import Any

import pytest

from protocol.lifecycle import LifeCycle
from tests.lifecycles import DOCUMENT, document, enums, life_cycles

CYCLES = {name: cycle for _, name, cycle in life_cycles()}


def complaints(cycle: LifeCycle[Any, Any]) -> list[str]:
    states, events = enums(cycle)
    reached, more = {cycle.born}, True
    while more:
        new = {then for (state, _), then in cycle.transitions.items() if state in reached} - reached
        reached, more = reached | new, bool(new)
    found = [f"{cycle.name}: nothing leads to {state.name}" for state in states if state not in reached]
    used = {event for _, event in cycle.transitions}
    return found + [f"{cycle.name}: {event.name} never happens" for event in events if event not in used]


@pytest.mark.parametrize("name", list(CYCLES))
def test_every_state_is_reached_and_every_event_does_something(name: str) -> None:
    assert complaints(CYCLES[name]) == []


@pytest.mark.parametrize("name", list(CYCLES))
def test_each_pair_leads_where_the_table_says_or_is_refused(name: str) -> None:
    cycle = CYCLES[name]
    for state, event in product(*enums(cycle)):
        if cycle.permits(state, event):
            assert cycle.after(state, event) is cycle.transitions[state, event]
        else:
            with pytest.raises(AssertionError, match=f"{event.name} happened to one that is {state.name}"):
                cycle.after(state, event)


def test_the_page_shows_the_tables_as_they_are() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "python -m tests.lifecycles --write"


class Lamp(Enum):
    DARK = auto()
    LIT = auto()
    BROKEN = auto()


class Push(Enum):
    ON = auto()
    OFF = auto()


def test_a_state_nothing_leads_to_and_an_event_that_never_happens_are_found() -> None:
    lamp = LifeCycle("lamp", Lamp.DARK, {(Lamp.DARK, Push.ON): Lamp.LIT})
    assert complaints(lamp) == ["lamp: nothing leads to BROKEN", "lamp: OFF never happens"]
