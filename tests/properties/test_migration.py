"""Whatever the schedule, no store escapes dirty logging; planted bugs let one escape and are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planted.plugin import Plants
from tests.properties.migration import PAGES, Migration

PAGE = st.one_of(st.sampled_from([0, 1, 5, 63, 64, 511, 512, 600, PAGES - 1]), st.integers(0, PAGES - 1))
STEP = st.one_of(
    st.tuples(st.just("cpu"), PAGE),
    st.tuples(st.just("dma"), PAGE),
    st.tuples(st.just("dma"), PAGE),
    st.tuples(st.just("read"), PAGE),
    st.tuples(st.just("sync"), PAGE),
    st.tuples(st.just("ack"), PAGE),
    st.tuples(st.just("move"), PAGE),
    st.tuples(st.just("lend"), PAGE),
)
KINDS: tuple[dict[str, Any], ...] = tuple(
    {"manual": manual, "pml": pml, "huge": huge, "device": device, "ring": ring}
    for manual, ring in ((0, False), (1, False), (3, False), (0, True))
    for pml in (False, True)
    for huge, device in ((False, False), (False, True), (True, True))
)


class Unsafe(Exception):
    """Nothing was lost yet; kvmd's own check says that it may be."""


def play(migration: Migration, steps: list[tuple[str, int]]) -> list[int]:
    for clock, (what, page) in enumerate(steps):
        byte = clock % 255 + 1
        do: dict[str, Callable[[], None]] = {
            "cpu": partial(migration.cpu, page % 2, page, byte),
            "read": partial(migration.cpu, page % 2, page),
            "dma": partial(migration.dma, page, byte),
            "sync": migration.sync,
            "ack": partial(migration.ack, page),
            "move": partial(migration.move_page, page),
            "lend": migration.lend,
            "restart": migration.restart,
        }
        do[what]()
    differences = migration.differences()
    if not differences and migration.violations():
        raise Unsafe(migration.violations())
    return differences


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), steps=st.lists(STEP, max_size=60))
def test_a_migrated_guest_is_the_same_after_any_schedule(
    kind: dict[str, Any], seed: int, steps: list[tuple[str, int]]
) -> None:
    assert play(Migration(seed, **kind), steps) == []


WORDS = ("cpu", "cpu", "dma", "dma", "dma", "read", "sync", "ack", "ack", "move", "lend", "restart")
WEIGHTS = (6, 6, 8, 8, 8, 4, 5, 4, 4, 0.5, 0.2, 0.2)


def soak(seed: int, kind: dict[str, Any], steps: int = 250) -> list[int]:
    random = Random(seed)
    few = [random.randrange(PAGES) for _ in range(12)]
    script = [(random.choices(WORDS, WEIGHTS)[0], random.choice(few)) for _ in range(steps)]
    return play(Migration(seed, **kind), script)


@pytest.mark.rfc("RFC-97")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(f"{k}{int(v)}" for k, v in kind.items()))
def test_a_long_run_migrates_every_byte(kind: dict[str, Any]) -> None:
    assert soak(1, kind) == []


# -- planted bugs --------------------------------------------------------------------------------------


DEVICE = {"manual": 0, "pml": True, "huge": False, "device": True, "ring": False}


def loses(kind: dict[str, Any]) -> bool:
    """A byte differs in one of a few runs, or the check of kvmd itself (I20) sees that one may."""
    for seed in range(8):
        try:
            if soak(seed, kind):
                return True
        except Unsafe:
            return True
    return False


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        ("R17-nobody-is-told", DEVICE),
        pytest.param("B-35-by-dirty-bit-under-a-device", DEVICE, marks=pytest.mark.defect("B-35")),
        ("R19-fast-fault-marks-nothing", DEVICE),
        pytest.param("B-34-no-mark-without-vcpu", DEVICE | {"ring": True}, marks=pytest.mark.defect("B-34")),
        ("R19-huge-leaves-stay-writable", DEVICE | {"huge": True}),
    ],
)
def test_a_planted_bug_loses_a_byte(plant: Plants, bug: str, kind: dict[str, Any]) -> None:
    assert all(soak(seed, kind) == [] for seed in range(2))
    plant(bug)
    assert loses(kind)
