"""Axes and what is left out of a line."""

from __future__ import annotations

import pytest

from qemu_shim.study.compare.svg import decades, straightened, ticks


@pytest.mark.parametrize(
    ("most", "base", "expected"),
    [
        (0, 10, [0, 1]),
        (4, 10, [0, 1, 2, 3, 4]),
        (518, 10, [0, 200, 400, 600]),
        (1024, 10, [0, 500, 1000, 1500]),
        (4096, 2, [0, 1024, 2048, 3072, 4096]),
        (5 << 20, 2, [0, 2 << 20, 4 << 20, 6 << 20]),
    ],
)
def test_an_axis_is_marked_in_round_numbers(most: float, base: int, expected: list[float]) -> None:
    assert ticks(most, base) == expected


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize("most", [0.001, 1, 7, 99, 101, 12345, 1e9])
def test_an_axis_reaches_what_is_drawn_with_few_marks(most: float, base: int) -> None:
    marks = ticks(most, base)
    assert marks[-1] >= most * 0.999
    assert marks[-2] < most
    assert len(marks) <= 6


def test_decades_hold_what_is_drawn() -> None:
    assert decades(3, 500) == [1, 10, 100, 1000]
    assert len(decades(10, 10)) == 2
    assert decades(0, 0)[0] > 0


def test_a_point_on_the_way_is_left_out_and_a_corner_is_not() -> None:
    assert straightened([(0, 0), (1, 1), (2, 2), (3, 0)]) == [(0, 0), (2, 2), (3, 0)]
    assert straightened([(0, 0), (0, 5), (0, 2)]) == [(0, 0), (0, 5), (0, 2)]
    assert straightened([(0, 0), (0, 0)]) == [(0, 0), (0, 0)]
