"""Mutated orders against the oracle, and that the fuzzer would find what it is there for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vfio_user.fuzz import run
from tests.vfio_user.planted import PLANTED

MESSAGES = 4_000  # of each seed; every planted mistake is found within as many of the first that finds it
SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_does_what_the_oracle_says(seed: int) -> None:
    seen = run(seed, MESSAGES).seen
    assert seen["hung up"]
    assert seen["errno 22"]
    assert seen["errno 0"] > MESSAGES / 4, "most messages must have got past the checks"


def what_is_wrong(seed: int) -> list[str]:
    """The oracle's assertion, or one of the server's own."""
    try:
        run(seed, MESSAGES)
    except Exception as error:
        return error.__notes__
    return []


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = [note for seed in SEEDS for note in what_is_wrong(seed)]
    assert any("--seed" in note for note in found)
