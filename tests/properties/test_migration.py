"""Whatever the schedule, no store escapes dirty logging; planted bugs let one escape and are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.tables import tdp_log, tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import TdpMmu
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


async def no_flush(self: Flusher, span: Any) -> None:
    """Bits are taken and told while old translations still store."""


def always_dirty_bit(mmu: TdpMmu, root: Any) -> bool:
    """D is cleared under an exported root, too (defect B-35)."""
    return bool(root.role.ad_enabled)


def silent_fast_fault(self: FaultPath, fault: Any, slot: Any, vcpu: Any) -> bool:
    """W comes back and nobody marks."""
    return tdp_log.fast_page_fault(self._mmu, self._fault_root(vcpu, 0), fault.gfn, logs=slot.logs)


def no_mark_of_devices(self: DirtyLog, slot: Any, gfn: Any, vcpu_id: int | None) -> None:
    """A mark with no vCPU is dropped (defect B-34)."""
    ring = None if vcpu_id is None else self.rings.get(vcpu_id)
    if ring is not None:
        ring.push(slot.number, gfn - slot.base_gfn)


def no_huge_protection(mmu: TdpMmu, root: Any, span: Any, wanted: Any = None) -> bool:
    """Huge leaves keep W."""
    cleared = False
    for met in mmu.leaves_in(root, span):
        if met.level == 1 and met.entry & 2 and (wanted is None or wanted(met.gfn)):
            mmu.writer.store64(met.at, met.entry & ~2)
            cleared = True
    return cleared


def no_split(mmu: TdpMmu, root: Any, span: Any, goal: Any, budget: int = 0) -> int:
    return 0


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
    ("owner", "name", "bug", "kind"),
    [
        (Flusher, "flush", no_flush, DEVICE),
        pytest.param(
            tdp_log,
            "logs_by_dirty_bit",
            always_dirty_bit,
            DEVICE,
            marks=pytest.mark.defect("B-35"),
        ),
        (FaultPath, "_fast_page_fault", silent_fast_fault, DEVICE),
        pytest.param(
            DirtyLog, "mark", no_mark_of_devices, DEVICE | {"ring": True}, marks=pytest.mark.defect("B-34")
        ),
    ],
    ids=["no flush", "B-35", "silent fast fault", "B-34"],
)
def test_a_planted_bug_loses_a_byte(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any, kind: dict[str, Any]
) -> None:
    assert all(soak(seed, kind) == [] for seed in range(2))
    monkeypatch.setattr(owner, name, bug)
    assert loses(kind)


def test_a_huge_page_left_writable_loses_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages of 2 MiB neither split nor protected."""
    kind = DEVICE | {"huge": True}
    assert soak(0, kind) == []
    monkeypatch.setattr(tdp_mmu, "split", no_split)
    monkeypatch.setattr(tdp_log, "protect", no_huge_protection)
    assert loses(kind)
