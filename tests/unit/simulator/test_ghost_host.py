"""The ghost beside private memory, and beside what a process and its host do at host addresses."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import Page
from kvmd.core.mm.reclaim import migrate, swap_out
from kvmd.core.slots.dirty_bitmap import DirtyBitmap
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.memslot import Memslot
from protocol.pt.bits import READ, WRITE
from protocol.units import PAGE_SIZE, Hva, Pfn
from simulator.ghost.backing import Shown, Truth
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts
from simulator.kernel.process import SimProcess
from simulator.world.scheduler import World as Scheduled
from tests.kit.kvmd import World
from tests.planted.plugin import Plants
from tests.unit.kvmd.own_root import BASE, PAGES, Managed
from tests.unit.kvmd.test_private_history import play
from tests.unit.simulator.world.toys import Script

RW = READ | WRITE
ROOT = 0x1000


def heard(verdicts: Verdicts) -> set[str]:
    return {violation.invariant for violation in verdicts.found}


# -- private memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_found_in_histories_of_private_memory(seed: int) -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        play(seed)
    assert ghost.verdicts.found == []
    assert any("guest_memfd" in str(space) for space in ghost.backing.spaces), "it was told of no file"


def test_of_two_who_watch_the_one_that_came_last_hears() -> None:
    first, last = Ghost(Verdicts()), Ghost(Verdicts())
    with watching(first):
        with watching(last):
            play(1)
        assert first.heard.now == 0 < last.heard.now
        play(1)
    assert first.heard.now == last.heard.now


@pytest.mark.parametrize(
    ("bug", "invariants"),
    [
        ("R24-converted-without-a-zap", {"R24"}),
        ("R24-hole-without-a-zap", {"I11", "I6"}),
    ],
)
def test_private_memory_in_the_wrong_hands_is_found(bug: str, invariants: set[str], plant: Plants) -> None:
    plant(bug)
    verdicts = Verdicts()
    for seed in range(6):
        with watching(Ghost(verdicts)), suppress(AssertionError):
            play(seed)
    assert heard(verdicts) & invariants


@pytest.mark.parametrize("private", [True, False])
def test_what_turns_private_is_mapped_by_no_other_mmu(private: bool) -> None:
    """An IOAS shows pages of the process, and its table maps one."""
    ghost = Ghost(Verdicts())
    for view in ("vm", "ioas"):
        ghost.shows(view, 0x10, 0x12, Shown("mm", 0x80, RW))
    ghost.backs("mm", 0x80, 0x82, Translation(0x500, RW))
    ghost.root_made(ROOT, 1, "ioas", "hwpt")
    ghost.entry_stored(ROOT + 8 * 0x11, 0x501 << 12 | RW)
    ghost.converts("vm", 0x10, 0x11, ["ioas"])
    assert ghost.verdicts.found == []
    ghost.converts("vm", 0x11, 0x12, ["ioas"] if private else [])
    assert heard(ghost.verdicts) == ({"R24"} if private else set())


# -- dirty logs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empties", [False, True])
def test_what_is_stored_to_a_slot_that_moves_is_still_to_be_told(
    empties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log goes along."""

    def emptied(log: DirtyLog, old: Memslot | None, new: Memslot) -> DirtyBitmap | None:
        return DirtyBitmap(new.npages, full=False) if new.logs else None

    if empties:
        monkeypatch.setattr(DirtyLog, "bitmap_for", emptied)
    ghost = Ghost(Verdicts())
    with watching(ghost) as watch:
        guest = Managed()
        guest.log()
        guest.write(3)
        guest.change_slot(0, 2 * BASE, PAGES, guest.hva, 1)
        watch.settled()
    assert heard(ghost.verdicts) == ({"I25"} if empties else set())


# -- mirrors ---------------------------------------------------------------------------------------------


def test_who_was_told_that_a_change_begins_hears_of_its_end() -> None:
    """A second mirror registers in its middle, and nobody knows any more who answers through the first."""
    ghost = Ghost(Verdicts())
    with watching(ghost) as watch:
        world = World()
        mirror, start, end = Mirror(world.mm), Hva(0), Hva(PAGE_SIZE)
        ioas: Any = SimpleNamespace(mm_cookie=world.mm.cookie)
        watch.on_demand.append(ioas)
        world.run(mirror.invalidate_range_start(start, end))
        going = Truth(0, 1, Shown(f"mm{world.mm.id}", 0, RW), None)
        (told,) = watch.told[id(mirror), start, end][0]
        assert ghost.backing.is_let_go(told, going)
        world.mm.notifiers += [Mirror(world.mm), Mirror(world.mm)]
        mirror.invalidate_range_end(start, end)
        assert not ghost.backing.is_let_go(told, going)


# -- deaths ----------------------------------------------------------------------------------------------


def test_a_walk_goes_on_in_a_root_whose_kvm_died_under_it() -> None:
    """What it fills is of the dead one's root, by the name that has now."""
    ghost = Ghost(Verdicts())
    with watching(ghost) as watch:
        ghost.table_taken(ROOT, "kvmd")
        ghost.root_made(ROOT, 1, None, "vm1")
        watch.filling[1, 2] = ROOT
        world = Scheduled(Script())
        world.kill(world.spawn(SimProcess(world.host, "kvmd"), lambda: None))
        ghost.cached(("iotlb", "unit0", "domain 2"), watch.filling[1, 2], 0, 1, Translation(5, RW))
    assert ghost.verdicts.found == []


def test_a_domain_of_a_dead_driver_leads_to_the_root_of_a_kvm_that_died_behind_it() -> None:
    """Its units walk on until they hear of either."""
    ghost, did = Ghost(Verdicts()), 2
    with watching(ghost) as watch:
        ghost.table_taken(ROOT, "kvmd")
        ghost.root_made(ROOT, 1, None, "vm1")
        hwpt: Any = SimpleNamespace(domain=SimpleNamespace(root=ROOT), attached=())
        watch.hwpts[did] = hwpt
        world = Scheduled(Script())
        for name in ("iommufdd", "kvmd"):
            world.kill(world.spawn(SimProcess(world.host, name), lambda: None))
        ghost.cached(("iotlb", "unit0", "domain 2"), watch.root(did, ROOT), 0, 1, Translation(5, RW))
    assert ghost.verdicts.found == []


@pytest.mark.parametrize(("gone", "owed"), [("device_sim", set()), ("qemu_shim", {"R28"})])
def test_a_driver_that_dies_behind_its_silicon_owes_it_nothing(gone: str, owed: set[str]) -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost) as watch:
        world = Scheduled(Script())
        watch.plugged = True
        for name in (gone, "iommufdd"):
            world.kill(world.spawn(SimProcess(world.host, name), lambda: None))
    ghost.liveness.stuck()
    assert heard(ghost.verdicts) == owed


# -- host addresses --------------------------------------------------------------------------------------


def play_host(world: World) -> None:
    """A page that goes from frame to frame, and to swap, and is read at each."""
    hva = world.map(2)
    world.run(world.mm.write(hva, b"before"))
    for change in (migrate, swap_out, migrate):
        world.run(change(world.mm, hva, PAGE_SIZE))
        assert world.run(world.mm.read(hva, 6)) == b"before"


def test_nothing_is_found_in_a_process_as_it_is() -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        play_host(World())
    assert ghost.verdicts.found == []


def test_a_process_that_reaches_the_frame_it_had_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose lookup slept and is not made again."""
    bytes_now, kept = Mm.bytes_now, dict[int, memoryview]()

    def found_before(mm: Mm, hva: Hva, size: int, *, write: bool) -> memoryview | None:
        found = bytes_now(mm, hva, size, write=write)
        return found if found is None else kept.setdefault(hva, found)

    monkeypatch.setattr(Mm, "bytes_now", found_before)
    ghost = Ghost(Verdicts())
    with watching(ghost), suppress(AssertionError):
        play_host(World())
    assert heard(ghost.verdicts) == {"I6"}


def test_a_copy_of_what_was_given_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Migration gives the old frame up before it copies it."""

    def move(memory: PageAllocator, page: Page, owner: int) -> Pfn:
        old, page.pfn = page.pfn, memory._take(page.level, owner)
        memory.frames.release(old, page.level)
        memory.view(page.pfn, PAGE_SIZE)[:] = memory.view(old, PAGE_SIZE)
        return memory._take(page.level, owner)  # for whoever releases what it is given

    monkeypatch.setattr(PageAllocator, "move", move)
    ghost = Ghost(Verdicts())
    with watching(ghost), suppress(AssertionError):
        play_host(World())
    assert heard(ghost.verdicts) == {"I6"}
