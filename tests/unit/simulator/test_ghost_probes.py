"""The ghost beside the cores as they are: it finds nothing in them, and a bug planted in them at its step."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from device_sim.core.context_tables import ContextTables
from device_sim.core.prq import PrqWriter
from iommufdd.core import qi
from iommufdd.core.device import IommufdDevice
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.iommufd import IommufdCtx
from iommufdd.core.iopf import Iopf
from iommufdd.core.object import Objects
from iommufdd.kvm_client import KvmTdp
from kvmd.core.export.exports import Exports
from kvmd.core.mm.table import PageTable
from kvmd.core.vm import Kvm
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes import attachments, private, processes
from simulator.ghost.probes.watching import SEAMS, watching
from simulator.ghost.violation import Verdicts, Violation
from tests.planted.plugin import Plants
from tests.properties.mirrored import play as play_host
from tests.properties.test_io_mirror import play as play_mirror
from tests.properties.test_kvmd import soak
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


PLANTED = {  # and what may say so
    "R7-device-tlb-keeps-everything": {"I9"},
    "R6-paging-structure-cache-stays": {"R6"},
    "cpus-are-not-flushed": {"R17"},
    "importers-are-not-told": {"R17"},
    "R4-acks-not-awaited": {"I6", "R17"},
    "B-18-drain-is-skipped": {"I6"},
    "R17-zap-unflushed": {"I6", "R21"},
    "R1-sequence-stands": {"I5"},
    "R1-range-not-looked-at": {"I5"},
    "R5-no-quarantine": {"I7"},
    "R16-bit-11": {"I2"},
    "R14-split-links-first": {"I4"},
    "unpinned-before-its-entry-goes": {"I6", "I11"},
    "R19-devices-mark-nothing": {"I25"},
}
IN_A_MIRROR = {
    "R1-lookup-never-stale": {"I5", "I11", "I6"},  # the last where its entry is taken out again before
    "R4-flush-of-another-not-awaited": {"I6"},
    "R4-units-are-not-asked": {"I9", "R6", "R23"},
    "unpinned-and-mapped": {"I6", "I11", "I5"},
    "unpinned-before-the-flush": {"I6", "I11", "I22"},
}
BUGS: dict[tuple[type[ByChance], str], set[str]] = {
    **{(JoinedAtRandom, name): expected for name, expected in PLANTED.items()},
    **{(MirrorAtRandom, name): expected for name, expected in IN_A_MIRROR.items()},
}


@pytest.mark.parametrize(("world", "bug"), BUGS)
def test_a_planted_bug_is_found_by_the_invariant_it_breaks(
    world: type[ByChance], bug: str, plant: Plants
) -> None:
    plant(bug)
    _found_by(world, BUGS[world, bug])


def test_an_ack_before_the_caches_drop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug of its own: what is in the queue is taken for done."""
    monkeypatch.setattr(Hwpt, "forget", acks_at_once)
    _found_by(JoinedAtRandom, {"I9", "R6"})


def _found_by(world: type[ByChance], expected: set[str]) -> None:
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


# What the stories of this file do not come to: iommufds, the end of an HWPT, mremap, an IOAS that pins all.
# Nor the end of a VM and of an export, and devices that do not snoop (test_ghost_faults.py), processes
# (tests/integration/simulator/test_deaths.py), and private memory (test_ghost_host.py).
ELSEWHERE = {
    *((IoPageTable, "release"), (PageTable, "move"), (Ioas, "show"), (Ioas, "leave")),
    *((Kvm, "destroy"), (Exports, "close"), (Exports, "register_noncoherent_dma")),
    *(seam for seam in processes.seams if seam != (Hwpt, "__init__")),
    *(seam for seam in private.seams if seam[1] != "__init__"),
    *(seam for seam in attachments.seams if seam[0] in (IommufdCtx, IommufdDevice, Iopf, KvmTdp, Objects)),
    *((IntelIommu, name) for _, name in attachments.seams if _ is IntelIommu and name != "put_pasid_entry"),
    *((ContextTables, "invalidate_contexts"), (ContextTables, "invalidate_pasids"), (PrqWriter, "_accept")),
    (PrqWriter, "_answer"),
}


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
    assert ghost.heard.now > 100
    assert ghost.verdicts.found == []


def test_a_table_of_iommufdd_s_that_is_freed_too_early_is_found(
    plant: Plants,
) -> None:
    """Those that were cut off are free at once, and the units know nothing of it (R23)."""
    plant("R4-units-are-not-asked")
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
