"""What is before what, and what two runs of one trace have in common, against the definition pair by pair."""

from __future__ import annotations

import pytest

from simulator.search import causality
from simulator.search.causality import KNOWN, Causality, Fingerprint
from simulator.search.option import Option, Touch, dependent
from tests.unit.simulator.search.toy import PROGRAMS, Order, ToyRun, every_run, order_of


def fingerprint(run: ToyRun, found: Fingerprint) -> int:
    found.begin()
    middle = len(run.steps) // 2
    found.add(run.steps[:middle])
    found.add(run.steps[middle:])
    return found.value


@pytest.mark.parametrize("known", [KNOWN, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_have_a_fingerprint_in_common_if_and_only_if_they_are_one_trace(
    name: str, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little of other runs is remembered."""
    monkeypatch.setattr(causality, "KNOWN", known)
    of_trace: dict[Order, set[int]] = {}
    found = Fingerprint()
    for run in every_run(PROGRAMS[name][0]):
        of_trace.setdefault(order_of(run.steps), set()).add(fingerprint(run, found))
    assert all(len(found) == 1 for found in of_trace.values())
    assert len({found.pop() for found in of_trace.values()}) == len(of_trace)


def test_a_fingerprint_is_a_number_of_the_trace_alone() -> None:
    """Not of the interpreter: a story's is compared with one that another machine made."""
    found = Fingerprint()
    store = Option("kvmd", "store", frozenset({Touch(("word", 7, 0), True)}))
    load = Option("device_sim", "load", frozenset({Touch(("word", 7, 0), False)}))
    found.add([store, load])
    assert found.value == 0xA844C8034D2DDFC1


@pytest.mark.parametrize("name", PROGRAMS)
def test_before_is_the_transitive_closure_of_dependence(name: str) -> None:
    for run in every_run(PROGRAMS[name][0]):
        order = Causality()
        for step in run.steps:
            order.add(step)
        before: list[set[int]] = []
        for place, step in enumerate(run.steps):
            direct = {
                other
                for other in range(place)
                if run.steps[other].actor == step.actor or dependent(run.steps[other].touches, step.touches)
            }
            before.append(direct.union(*(before[other] for other in direct)))
        assert order.before == [sum(1 << other for other in found) for found in before]
