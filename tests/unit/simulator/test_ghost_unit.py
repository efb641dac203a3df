"""What the ghost says of a remapping unit and of the functions behind it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from device_sim.core.context_tables import ContextTables
from device_sim.core.dmar import NOT_PRESENT, RemappingUnit
from device_sim.core.iotlb import Iotlb
from protocol.pt.geometry import ENTRY_BYTES
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from tests.kit.silicon import Silicon

PAGE = 7


def heard(ghost: Ghost) -> list[str]:
    return [violation.invariant for violation in ghost.verdicts.found]


def attached() -> Silicon:
    silicon = Silicon()
    silicon.attach()
    return silicon


@pytest.mark.parametrize(("owner", "invariant"), [("kvmd", "I7"), ("iommufdd", "R23")])
def test_a_walk_that_loads_from_a_table_page_that_was_given_up_is_seen(owner: str, invariant: str) -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        silicon = attached()
        ghost.table_taken(silicon.tables.root, owner)
        silicon.translate(PAGE)
        assert heard(ghost) == []
        ghost.table_given_up(silicon.tables.root)
        silicon.translate(PAGE)
    assert heard(ghost) == [invariant]


@pytest.mark.parametrize("waits", [False, True])
def test_what_waits_in_a_store_buffer_a_unit_need_not_grant(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stored it told of it; what others see in memory is to be granted."""
    fill = RemappingUnit._fill

    def walked_in_vain(*args: Any) -> Any:
        fill(*args)
        return NOT_PRESENT

    monkeypatch.setattr(RemappingUnit, "_fill", walked_in_vain)
    ghost = Ghost(Verdicts())
    with watching(ghost):
        silicon = attached()
        tables = silicon.tables
        silicon.map(PAGE, 1)
        ghost.root_made(tables.root, 4, None, "kvm")
        for at in range(tables.root, tables.root + len(tables.memory), ENTRY_BYTES):
            if entry := tables.load(at):
                ghost.entry_stored(at, entry)
        if waits:
            tables.unmap(PAGE)
        silicon.translate(PAGE)
    assert heard(ghost) == ([] if waits else ["R20"])


def test_what_a_unit_answers_without_a_walk_is_judged_by_no_walk_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that caches what is absent [CAP.CM] asks for no word again."""
    lookup = Iotlb.lookup
    ghost = Ghost(Verdicts())
    with watching(ghost):
        silicon = attached()
        tables = silicon.tables
        ghost.root_made(tables.root, 4, None, "kvm")
        silicon.translate(PAGE)
        silicon.map(PAGE, 1)
        for at in range(tables.root, tables.root + len(tables.memory), ENTRY_BYTES):
            if entry := tables.load(at):
                ghost.entry_stored(at, entry)
        monkeypatch.setattr(Iotlb, "lookup", lambda *args: lookup(*args) or NOT_PRESENT)
        silicon.translate(PAGE)
    assert heard(ghost) == ["R20"]


def test_no_lookup_of_the_units_is_the_ghosts() -> None:
    """An eviction that is due at one would be spent on it (simulator/faults/seams.py)."""
    lookups = Counter[bool]()
    second_stage = ContextTables.second_stage
    for watched in (False, True):

        def counting(tables: ContextTables, rid: int, watched: bool = watched) -> Any:
            lookups[watched] += 1
            return second_stage(tables, rid)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ContextTables, "second_stage", counting)
            if watched:
                with watching(Ghost(Verdicts())):
                    attached().translate(PAGE)
            else:
                attached().translate(PAGE)
    assert lookups[True] == lookups[False] > 0
