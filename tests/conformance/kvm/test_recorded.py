"""kvmd answers as the recorded KVM did, case by case; and as the kernel's source says it would have answered.

`data-own` has cases nobody recorded, each with the reason for its answers in its `note`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.conformance.kvm.cases import Case, load
from tests.conformance.kvm.replay import Outcome
from tests.conformance.kvm.runner import replay_all

HERE = Path(__file__).parent
FILES = [*sorted((HERE / "data").glob("*.json")), HERE / "data-own" / "reasoned.json"]
CASES = [case for path in FILES for case in load(path) if not case.skip]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """One kvmd replays all of them; it must end with status 0."""
    return {outcome.case.id: outcome for outcome in trio.run(replay_all, CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kvmd_answers_as_recorded(case: Case, outcomes: dict[str, Outcome]) -> None:
    assert [str(difference) for difference in outcomes[case.id].differences] == []


def test_no_two_cases_share_a_name() -> None:
    """Or one would hide the other's outcome."""
    assert len({case.id for case in CASES}) == len(CASES) > 300
