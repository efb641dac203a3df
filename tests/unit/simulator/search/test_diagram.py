"""Diagrams: what they show of a run, and where."""

from __future__ import annotations

import pytest

from simulator.search.diagram import ShownStep, draw, racing, rows_of
from simulator.search.option import Option, Touch


def step(actor: str, label: str, *places: str) -> Option:
    return Option(
        actor, label, frozenset(Touch(place.lstrip("!"), place.startswith("!")) for place in places)
    )


RUN = [
    step("kvmd", "zero the new table", "!new"),
    step("kvmd", "link the new table", "!pd"),
    step("device_sim", "load PD", "pd"),
    step("device_sim", "load new table", "new"),
    step("kvmd", "fill the new table", "!new"),
    step("device_sim<iommufdd", "is told to forget", "!device_sim"),
    step("iommufdd", "counts", "!count"),
]


def process_of(actor: str) -> str:
    return actor.split("<")[0]


def test_steps_that_race_with_another_process_are_seen() -> None:
    assert racing(RUN, process_of) == {0, 1, 2, 3, 4}


def test_a_diagram_has_a_column_a_process_and_the_steps_that_matter() -> None:
    rows = rows_of(RUN, [2, 6], process_of, lambda step: step.label)
    assert draw(rows, 70) == (
        "   kvmd                   device_sim             iommufdd\n"
        "   zero the new table\n"
        "   link the new table\n"
        "*                         load PD\n"
        "                          load new table\n"
        "   fill the new table\n"
        "*                                                counts\n"
    )


def test_what_has_no_text_is_left_out() -> None:
    names = {"link the new table": "PD[1] := table"}
    rows = rows_of(RUN, [], process_of, lambda step: names.get(step.label, ""))
    assert rows == [ShownStep("kvmd", "PD[1] := table")]


@pytest.mark.parametrize("processes", [1, 2, 4, 9])
def test_a_diagram_is_never_wider_than_it_may_be(processes: int) -> None:
    rows = [
        ShownStep(f"process {place}", f"stores {'words ' * 30}", chosen=True) for place in range(processes)
    ]
    drawn = draw(rows)
    assert max(map(len, drawn.splitlines())) <= 110
    assert drawn.count("words") == 30 * processes
    assert drawn.count("*") == processes


def test_nothing_to_show() -> None:
    assert draw([]) == ""
