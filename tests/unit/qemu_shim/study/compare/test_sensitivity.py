"""Where the ranking turns: computed from lines, checked by pricing both sides of the turn."""

from __future__ import annotations

import pytest

from qemu_shim.study.compare.costs import Costs, default_costs
from qemu_shim.study.compare.ranking import TIE
from qemu_shim.study.compare.sensitivity import SWEPT, plane, rank_changes, total_us

CHEAP_FAULTS = {"io_groups": 100.0, "cpu_faults": 0.0}
DEAR_START = {"pages_pinned": 5000.0, "cleared_for_host": 5000.0}


def leads(runs: dict[str, dict[str, float]], costs: Costs, one: str, other: str) -> bool:
    """By more than a tie."""
    values = costs.values()
    return total_us(runs[one], values) * (1 + TIE) <= total_us(runs[other], values)


def test_a_turn_worked_out_by_hand() -> None:
    runs = {"mirror": CHEAP_FAULTS, "pinned": DEAR_START}
    start = 5000 * 0.245e6 / 262144
    (turn,) = (t for t in rank_changes(runs, default_costs()) if t.constant == "io_fault_factor")
    assert turn.at == pytest.approx(1.05 * start / (100 * 2), rel=1e-6)
    assert (turn.overtakes, turn.overtaken, turn.above) == ("pinned", "mirror", True)


def test_on_both_sides_of_every_turn_the_order_is_as_told() -> None:
    runs = {
        "mirror": CHEAP_FAULTS,
        "pinned": DEAR_START,
        "shared": {"io_groups": 60.0, "swap_ins_besides": 2.0},
    }
    turns = rank_changes(runs, default_costs())
    assert {turn.constant for turn in turns} > {*SWEPT}
    for turn in turns:
        assert not leads(runs, default_costs(), turn.overtakes, turn.overtaken)
        for at, first in ((turn.at * 0.999, not turn.above), (turn.at * 1.001, turn.above)):
            costs = default_costs().with_values({turn.constant: at})
            assert leads(runs, costs, turn.overtakes, turn.overtaken) == first, turn


def test_designs_that_tie_and_come_apart_are_told_as_those_that_change_places() -> None:
    runs = {"managed": {"io_groups": 100.0}, "shared": {"io_groups": 99.0, "flushes": 10.0}}
    (turn,) = (t for t in rank_changes(runs, default_costs()) if t.constant == "tlb_flush")
    assert (turn.overtakes, turn.overtaken, turn.above) == ("managed", "shared", True)
    assert 99 * 20 + 10 * turn.at == pytest.approx(1.05 * 100 * 20)


def test_designs_that_cost_the_same_do_not_overtake_each_other() -> None:
    assert rank_changes({"mirror": CHEAP_FAULTS, "notifier": CHEAP_FAULTS}, default_costs()) == []


def test_a_turn_outside_a_constants_range_is_not_told() -> None:
    runs = {"mirror": {"io_groups": 1.0}, "pinned": {"swap_ins_besides": 1.0}}
    assert [t for t in rank_changes(runs, default_costs()) if t.constant == "io_fault_factor"] == []


def test_the_two_swept_constants_are_in_no_term_together() -> None:
    events = {"io_groups": 3.0, "io_faults_major": 2.0, "cpu_faults": 5.0}
    fixed, factor, swap = plane(events, default_costs())
    assert (fixed, factor, swap) == pytest.approx((10, 6, 2))
