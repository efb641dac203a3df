"""Who is in a ranking, and what is a tie in it."""

from __future__ import annotations

import pytest

from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.ranking import SAME, TIE, tie, tiers, undeclared
from qemu_shim.study.compare.schema import WorkloadFigures
from qemu_shim.vmm.designs import DESIGNS
from tests.unit.qemu_shim.study.compare.runs import made_up


def compared(*runs: Run) -> WorkloadFigures:
    (workload,) = compare(runs, default_costs(), "-").workloads
    return workload


def with_counts(run: Run, **counts: int) -> Run:
    last = run.samples[-1]
    run.samples[-1] = Sample(last.step, {**last.counts, **counts}, last.gauges)
    return run


def test_less_than_a_twentieth_is_a_tie() -> None:
    assert TIE == 0.05
    assert [tie(100, us) for us in (100, 104.9, 105, 106)] == [True, True, False, False]


def test_those_that_tie_with_the_first_of_them_stand_together() -> None:
    """A tie is with the cheapest of the tier: a row of small steps is not one tie."""
    assert tiers({"a": 100, "b": 104, "c": 108, "d": 109, "e": 200}) == [["a", "b"], ["c", "d"], ["e"]]
    assert tiers({"x": 0.0, "y": 0.0, "z": 1.0}) == [["x"], ["y"], ["z"]]
    assert tiers({}) == []


def test_who_did_not_do_the_same_work_is_ranked_nowhere() -> None:
    nothing = Run("w", "mirror", 1, {}, refusals=[Refusal("the device", "it cannot fault")])
    broken = made_up("notifier", "w")
    broken.problems.append("I8: lost")
    refused = made_up("pinned", "w")
    refused.refusals = [Refusal("ballooning", "pinned pages stay")] * 2
    workload = compared(nothing, broken, refused, made_up("managed", "w"), made_up("shared", "w"))
    assert sorted(name for tier in workload.order for name in tier) == ["managed", "shared"]
    assert workload.unranked == {
        "pinned": "it refused: ballooning",
        "mirror": "it did not start",
        "notifier": "it failed",
    }
    assert [it.design for it in workload.designs] == list(DESIGNS)
    assert {turn.overtaken for turn in workload.changes} <= {"managed", "shared"}
    assert undeclared(workload.designs, workload.unranked) == ["notifier"]


@pytest.mark.parametrize("count", SAME)
@pytest.mark.parametrize("by", [-1, 1])
def test_other_work_that_was_not_refused_is_seen_however_little(count: str, by: int) -> None:
    runs = [made_up(design, "w") for design in ("mirror", "notifier", "managed", "shared")]
    usual = runs[0].samples[-1].counts[count]
    with_counts(runs[1], **{count: usual + by})
    workload = compared(*runs)
    assert workload.unranked == {
        "notifier": f"it did other work and refused nothing: {count} {usual + by:,} for {usual:,}"
    }
    assert undeclared(workload.designs, workload.unranked) == ["notifier"]


def test_who_refuses_does_not_say_what_is_usual() -> None:
    refused = with_counts(made_up("pinned", "balloon"), work_descriptors=1)
    workload = compared(refused, made_up("shared", "balloon"))
    assert list(workload.unranked) == ["pinned"]
    assert undeclared(workload.designs, workload.unranked) == []
