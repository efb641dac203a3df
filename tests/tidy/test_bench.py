"""The stages of a fault that `bench` stamps are there: figures are run seldom, and functions move."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest

from bench.ours.fault import WAY
from bench.ours.staged import POINTS

STAMPED = {(daemon, stamp) for daemon, points in POINTS.items() for _, *stamps in points for stamp in stamps}


@pytest.mark.parametrize("where", [where for points in POINTS.values() for where, _, _ in points])
def test_what_is_stamped_is_there(where: str) -> None:
    module, _, qualified = where.partition(":")
    found = reduce(getattr, qualified.split("."), importlib.import_module(module))
    assert callable(found)


def test_each_stage_of_the_way_is_stamped() -> None:
    assert {(daemon, stamp) for daemon, stamp, _ in WAY} <= STAMPED
