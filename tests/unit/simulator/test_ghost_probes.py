"""The ghost beside the cores as they are: it finds nothing in them, and a bug planted in them at its step."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from device_sim.core.devtlb import DevTlb
from device_sim.core.iotlb import Iotlb
from iommufdd.core import qi
from iommufdd.core.hmm import Lookup
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.mirror_pins import MirrorPins
from kvmd.core.cpu.vcpus import Vcpus
from kvmd.core.export.pinning import Pinning
from kvmd.core.mm.table import PageTable
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import TdpMmu
from kvmd.core.tables.zap import Zapper
from kvmd.core.vm import Kvm
from protocol.pt.format import TableFormat
from protocol.pt.table_pool import TablePool
from protocol.units import Gfn
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import SEAMS, watching
from simulator.ghost.violation import Verdicts, Violation
from tests.properties.mirrored import play as play_host
from tests.properties.planted import rewritten
from tests.properties.test_io_mirror import (
    ack_own_only,
    forget_nothing,
    keep_entries,
    never_stale,
    unpin_first,
)
from tests.properties.test_io_mirror import play as play_mirror
from tests.properties.test_kvmd import (
    forgets_importers,
    marker_at_bit_11,
    never_changing,
    no_acks,
    no_drain,
    no_quarantine,
    no_sequence,
    soak,
)
from tests.unit.simulator.joined_at_random import ByChance, JoinedAtRandom, MirrorAtRandom

STEPS = 300
SEEDS = 40  # in which each planted bug is found at least once


class FoundOut(BaseException):
    """What is planted was seen; nothing of the product catches this."""


def watched(
    world_of: type[ByChance], seed: int, tell: Callable[[Violation], None] = lambda violation: None
) -> Ghost:
    ghost = Ghost(Verdicts(tell))
    with watching(ghost) as watch:
        world = world_of(seed)
        world.play(STEPS)
        watch.settled()
    assert world.accesses, "the device reached nothing"
    assert ghost.groups.outstanding == []
    return ghost


@pytest.mark.parametrize("world", [JoinedAtRandom, MirrorAtRandom])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_found_in_the_cores_as_they_are(world: type[ByChance], seed: int) -> None:
    assert watched(world, seed).verdicts.found == []


# -- planted bugs --------------------------------------------------------------------------------------


async def acks_at_once(self: Hwpt, start: Any, size: int) -> None:
    """The descriptors are on their way, and nobody waits for the wait behind them."""
    for unit in dict.fromkeys(self.attached.values()):
        assert isinstance(unit, IntelIommu)
        unit.queue.submit(qi.invalidate(unit.cap, self.domain.did, self.behind(unit), start, size)).send(None)


def keeps_everything(self: DevTlb, start: Any, npages: int) -> None:
    """Told to forget, it does not."""


def cpus_not_told(self: Vcpus, span: Any) -> None:
    """INVEPT is forgotten."""


def no_mark(self: DirtyLog, slot: Any, gfn: Gfn, vcpu_id: int | None, npages: int = 1) -> None:
    """Of a device's store nothing is written down."""
    if vcpu_id is not None and slot.logs:
        self.rings.get(vcpu_id)
        if slot.dirty is not None:
            slot.dirty.mark(gfn - slot.base_gfn, npages)


PLANTED: dict[str, tuple[Any, str, Any, set[str]]] = {
    "an invalidation is acked before the caches drop": (Hwpt, "forget", acks_at_once, {"I9", "R6"}),
    "a device TLB keeps what it is told to drop": (DevTlb, "invalidate", keeps_everything, {"I9"}),
    "the hint IH is always believed to be set": (
        Iotlb,
        "invalidate_pages",
        rewritten(Iotlb, "invalidate_pages", "if not leaves_only:", "if False:"),
        {"R6"},
    ),
    "CPUs are not told of a flush": (Vcpus, "flush_tlb", cpus_not_told, {"R17"}),
    "importers are not told of a flush": (Kvm, "_tell_walkers", forgets_importers, {"R17"}),
    "acks are not waited for": (Flusher, "flush", no_acks, {"I6", "R17"}),
    "drain is skipped": (Flusher, "drain", no_drain, {"I6"}),
    "what was cleared is not flushed": (
        Zapper,
        "zap",
        rewritten(Zapper, "zap", "    if unflushed:\n        await self._flusher.flush(told)\n", ""),
        {"I6", "R21"},
    ),
    "the sequence is not advanced": (HostChanges, "invalidate_range_end", no_sequence, {"I5"}),
    "ranges in change are not looked at": (HostChanges, "is_changing", never_changing, {"I5"}),
    "table pages skip the quarantine": (TablePool, "quarantine", no_quarantine, {"I7"}),
    "bit 11 marks table entries": (TableFormat, "make_table", marker_at_bit_11, {"I2"}),
    "a split is linked, then filled": (
        TdpMmu,
        "split_leaf",
        rewritten(
            TdpMmu,
            "split_leaf",
            "self.writer.fill_unlinked(table, split_children(root.format, leaf, level))\n",
            "self.link(root, gfn, level, at, leaf, table)\n"
            "    self.writer._linked.discard(table)\n"
            "    self.writer.fill_unlinked(table, split_children(root.format, leaf, level))\n"
            "    return\n",
        ),
        {"I4"},
    ),
    "a page is unpinned before its entry goes": (
        Pinning,
        "_take_back",
        rewritten(
            Pinning,
            "_take_back",
            "    if zapped:\n",
            "    self.put(pages)\n    pages = []\n    if zapped:\n",
        ),
        {"I6", "I11"},
    ),
    "nothing marks what a device stores": (DirtyLog, "mark", no_mark, {"I25"}),
}


IN_A_MIRROR: dict[str, tuple[Any, str, Any, set[str]]] = {
    "what went during a lookup is not looked at": (Lookup, "stale", never_stale, {"I5", "I11"}),
    "another's flush is not waited for": (HwptPaging, "give_up", ack_own_only, {"I6"}),
    "nothing is flushed": (Hwpt, "forget", forget_nothing, {"I9", "R6", "R23"}),
    "what is unpinned stays mapped": (MirrorPins, "unpin", keep_entries, {"I6", "I11", "I5"}),
    "the host is told of an unpin first": (MirrorPins, "unpin", unpin_first, {"I6", "I11", "I22"}),
}
BUGS: dict[tuple[type[ByChance], str], tuple[Any, str, Any, set[str]]] = {
    **{(JoinedAtRandom, name): bug for name, bug in PLANTED.items()},
    **{(MirrorAtRandom, name): bug for name, bug in IN_A_MIRROR.items()},
}


@pytest.mark.parametrize(("world", "bug"), BUGS)
def test_a_planted_bug_is_found_by_the_invariant_it_breaks(
    world: type[ByChance], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, planted, expected = BUGS[world, bug]
    monkeypatch.setattr(owner, name, planted)
    for seed in range(SEEDS):
        found = _first(world, seed)
        if found is not None:
            assert found.invariant in expected, str(found)
            return
    raise AssertionError(f"not found in {SEEDS} stories")


def _first(world: type[ByChance], seed: int) -> Violation | None:
    """What is seen first, at its step: the story ends there."""
    seen: list[Violation] = []

    def tell(violation: Violation) -> None:
        seen.append(violation)
        raise FoundOut

    with suppress(FoundOut, AssertionError):  # the cores' own asserts may be first
        watched(world, seed, tell)
    return seen[0] if seen else None


# -- the seams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_each_seam_is_a_method_of_its_own_class(seam: tuple[type, str]) -> None:
    owner, name = seam
    assert inspect.isfunction(inspect.unwrap(vars(owner)[name]))


# What the stories of this file do not come to: the end of an HWPT, mremap, an IOAS that pins all it shows.
ELSEWHERE = {(IoPageTable, "release"), (PageTable, "move"), (Ioas, "show"), (Ioas, "leave")}


def test_the_ghost_hears_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted beneath the probes and within them: nothing of the product has a way around them."""
    made: Counter[tuple[type, str]] = Counter()
    heard: Counter[tuple[type, str]] = Counter()
    for seam, around in list(SEAMS.items()):
        original = vars(seam[0])[seam[1]]
        monkeypatch.setattr(*seam, _counted(made, seam, original))
        monkeypatch.setitem(SEAMS, seam, _counted(heard, seam, around))
    for seed in range(3):
        watched(JoinedAtRandom, seed)
        watched(MirrorAtRandom, seed)
    with watching(Ghost(Verdicts())):
        soak(1, 60, own=True)  # slots come and go: roots that CPUs alone walk become obsolete
    assert made == heard
    assert set(SEAMS) - set(made) == ELSEWHERE


def _counted(counts: Counter[tuple[type, str]], seam: tuple[type, str], call: Any) -> Any:
    def counting(*args: Any, **named: Any) -> Any:
        counts[seam] += 1
        return call(*args, **named)

    return counting


OTHERS: dict[str, Callable[[], Any]] = {
    "a table of iommufdd's": lambda: play_mirror(1),
    "another one": lambda: play_mirror(2),
    "mirrors of a process": lambda: play_host(3),
    "a VM of CPUs": lambda: soak(2, 100),
    "a VM with a root of the IOMMU's own": lambda: soak(3, 100, own=True),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_is_found_in_the_worlds_of_other_tests(kind: str) -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        OTHERS[kind]()
    assert ghost.now > 100
    assert ghost.verdicts.found == []


def test_a_table_of_iommufdd_s_that_is_freed_too_early_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were cut off are free at once, and the units know nothing of it (R23)."""
    monkeypatch.setattr(Hwpt, "forget", forget_nothing)
    found: set[str] = set()
    for seed in range(8):
        ghost = Ghost(Verdicts())
        with watching(ghost), suppress(AssertionError):
            play_mirror(seed)
        found |= {violation.invariant for violation in ghost.verdicts.found}
    assert {"I9", "R6", "R23"} <= found


def test_the_product_is_as_it_was_when_nobody_watches_any_more() -> None:
    before = {seam: vars(seam[0])[seam[1]] for seam in SEAMS}
    with watching(Ghost(Verdicts())):
        assert all(vars(owner)[name] is not was for (owner, name), was in before.items())
    assert {seam: vars(seam[0])[seam[1]] for seam in SEAMS} == before
