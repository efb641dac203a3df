"""What stands in for a method takes what that takes, or its caller fails and the ghost hears nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from simulator.ghost.probes.watch import Around
from simulator.ghost.probes.watching import SEAMS


def taken(method: Callable[..., Any], left_out: int) -> list[inspect.Parameter]:
    return [*inspect.signature(method).parameters.values()][left_out:]


@pytest.mark.parametrize(
    ("owner", "name", "around"),
    [(*seam, around) for seam, around in SEAMS.items()],
    ids=[f"{owner.__name__}.{name}" for owner, name in SEAMS],
)
def test_a_seam_takes_what_its_method_takes(owner: type, name: str, around: Around) -> None:
    method, seam = taken(vars(owner)[name], 1), taken(around, 3)  # behind watch, original and self
    kinds = {parameter.kind for parameter in seam}
    if inspect.Parameter.VAR_KEYWORD in kinds:  # those by name go through, whatever they are
        method = [each for each in method if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        seam = [each for each in seam if each.kind is not inspect.Parameter.VAR_KEYWORD]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        assert [each.kind for each in seam] == [each.kind for each in method]
