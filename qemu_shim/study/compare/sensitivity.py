"""What the modelled time of a run would be with other constants, and which change of one changes the ranking.

The time is linear in each constant, so where one design comes to lead another is computed, not searched.
"""

from __future__ import annotations

from collections.abc import Mapping

from qemu_shim.study.compare.costs import Costs, Values, paid
from qemu_shim.study.compare.ranking import TIE, tie, tiers
from qemu_shim.study.compare.schema import RankChange

SWEPT = ("io_fault_factor", "swap_in")  # the two that matter most, and on which the sources differ most
UNSURE = 10.0  # what has no range is tried at a tenth of its value, and at ten times

Events = Mapping[str, float]


def total_us(events: Events, values: Values) -> float:
    return sum(paid(events, values).values())


def plane(events: Events, costs: Costs) -> tuple[float, float, float]:
    """Fixed part, and what each unit of the two swept constants adds; they are in no term together."""
    factor, swap_in = SWEPT
    zero = {factor: 0.0, swap_in: 0.0}
    fixed = total_us(events, costs.values(**zero))
    return (
        fixed,
        total_us(events, costs.values(**zero | {factor: 1.0})) - fixed,
        total_us(events, costs.values(**zero | {swap_in: 1.0})) - fixed,
    )


def swept_ends(costs: Costs) -> tuple[dict[str, float], dict[str, float]]:
    """Both swept constants at their low ends, and at their high ends."""
    chosen = [costs.constants[name] for name in SWEPT]
    return {c.name: c.low for c in chosen}, {c.name: c.high for c in chosen}


def rank_changes(runs: Mapping[str, Events], costs: Costs) -> list[RankChange]:
    """Of the swept constants, every change within their ranges; of the others, those of the first place.

    One change is one constant moved, all others at their values, until a design that does not lead another by
    more than a tie does.
    """
    now = {design: total_us(events, costs.values()) for design, events in runs.items()}
    order = tiers(now)
    found = []
    for name, constant in costs.constants.items():
        unsure = (constant.value / UNSURE, constant.value * UNSURE)
        if constant.unit == "share":
            unsure = (unsure[0], 1.0)
        low, high = (constant.low, constant.high) if constant.ranged else unsure
        none, one = costs.values(**{name: 0.0}), costs.values(**{name: 1.0})
        base = {design: total_us(events, none) for design, events in runs.items()}
        slope = {design: total_us(events, one) - base[design] for design, events in runs.items()}
        for led in [design for tier in (order if name in SWEPT else order[:1]) for design in tier]:
            for leads in now:
                tilt = slope[led] - (1 + TIE) * slope[leads]
                if leads == led or not tie(now[leads], now[led]) or not tilt:
                    continue
                at = ((1 + TIE) * base[leads] - base[led]) / tilt
                if low <= at <= high:
                    found.append(
                        RankChange(
                            constant=name,
                            at=round(at, 6),
                            above=at > constant.value,
                            overtakes=leads,
                            overtaken=led,
                        )
                    )
    return found
