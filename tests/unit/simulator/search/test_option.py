"""Dependence of steps, word by word."""

from __future__ import annotations

import pytest

from simulator.search.option import Touch, dependent

LOAD, STORE = Touch(("word", 7, 0), writes=False), Touch(("word", 7, 0), writes=True)
ELSEWHERE = Touch(("word", 7, 1), writes=True)


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        ({LOAD}, {LOAD}, False),
        ({LOAD}, {STORE}, True),
        ({STORE}, {LOAD}, True),
        ({STORE}, {STORE}, True),
        ({STORE}, {ELSEWHERE}, False),
        ({LOAD, ELSEWHERE}, {STORE}, True),
        (set(), {STORE}, False),
    ],
)
def test_steps_are_dependent_if_one_writes_what_both_touch(
    one: set[Touch], other: set[Touch], answer: bool
) -> None:
    assert dependent(frozenset(one), frozenset(other)) is answer
