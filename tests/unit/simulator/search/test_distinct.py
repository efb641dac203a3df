"""Distinct traces, held to a set that keeps them all."""

from __future__ import annotations

from random import Random

import pytest

from simulator.search.distinct import BITS, KEPT, Distinct

MANY = 20_000


def numbers(count: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.getrandbits(BITS) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, KEPT - 1])
def test_few_are_counted(count: int) -> None:
    distinct = Distinct()
    distinct.add(numbers(count) * 3)
    assert distinct.count == count


@pytest.mark.parametrize("seed", range(5))
def test_many_are_estimated_however_often_they_come(seed: int) -> None:
    """Within four standard deviations."""
    many = numbers(MANY, seed)
    distinct = Distinct()
    for part in range(40):
        distinct.add(many[part * 500 : part * 500 + 1000])  # each but the first in two of them
    assert abs(distinct.count - len(set(many))) < 4 * MANY / KEPT**0.5


def test_what_was_kept_in_between_makes_no_difference() -> None:
    many = numbers(2 * KEPT)
    whole, resumed = Distinct(), Distinct()
    whole.add(many)
    resumed.add(many[:400])
    resumed = Distinct.from_text(resumed.to_text())
    resumed.add(many[300:])
    assert resumed.to_text() == whole.to_text()
    assert len(whole.to_text()) <= KEPT * 11
