"""Where the ranking turns: computed from lines, checked by pricing both sides of the turn."""

from __future__ import annotations

import pytest

from qemu_shim.compare.costs import Costs, default_costs
from qemu_shim.compare.sensitivity import SWEPT, plane, rank_changes, total_us

CHEAP_FAULTS = {"io_faults": 100.0, "cpu_faults": 0.0}
DEAR_START = {"pages_pinned": 5000.0, "cleared_for_host": 5000.0}


def order(runs: dict[str, dict[str, float]], costs: Costs) -> list[str]:
    return sorted(runs, key=lambda name: total_us(runs[name], costs.values()))


def test_a_turn_worked_out_by_hand() -> None:
    runs = {"mirror": CHEAP_FAULTS, "pinned": DEAR_START}
    start = 5000 * 0.245e6 / 262144
    (turn,) = (t for t in rank_changes(runs, default_costs()) if t.constant == "io_fault_factor")
    assert turn.at == pytest.approx(start / (100 * 2), rel=1e-6)
    assert (turn.overtakes, turn.overtaken, turn.above) == ("pinned", "mirror", True)


def test_on_both_sides_of_every_turn_the_order_is_as_told() -> None:
    runs = {
        "mirror": CHEAP_FAULTS,
        "pinned": DEAR_START,
        "shared": {"io_faults": 60.0, "swap_ins_besides": 2.0},
    }
    turns = rank_changes(runs, default_costs())
    assert {turn.constant for turn in turns} > {*SWEPT}
    for turn in turns:
        for at, first in ((turn.at * 0.999, not turn.above), (turn.at * 1.001, turn.above)):
            ranked = order(runs, default_costs().with_values({turn.constant: at}))
            overtook = ranked.index(turn.overtakes) < ranked.index(turn.overtaken)
            assert overtook == first, turn


def test_designs_that_cost_the_same_do_not_overtake_each_other() -> None:
    assert rank_changes({"mirror": CHEAP_FAULTS, "notifier": CHEAP_FAULTS}, default_costs()) == []


def test_a_turn_outside_a_constants_range_is_not_told() -> None:
    runs = {"mirror": {"io_faults": 1.0}, "pinned": {"swap_ins_besides": 1.0}}
    assert [t for t in rank_changes(runs, default_costs()) if t.constant == "io_fault_factor"] == []


def test_the_two_swept_constants_are_in_no_term_together() -> None:
    events = {"io_faults": 3.0, "io_faults_major": 2.0, "cpu_faults": 5.0}
    fixed, factor, swap = plane(events, default_costs())
    assert (fixed, factor, swap) == pytest.approx((10, 6, 2))
