"""The ghost's judges of faults, of roots that are lent, and of an entry by itself; each broken on purpose."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress

import pytest

from kvmd.core.host import CpuFeatures
from kvmd.core.mm.fork import fork
from protocol.pt.bits import READ, WRITE
from protocol.units import Gfn, GfnSpan
from simulator.ghost.backing import Shown
from simulator.ghost.faults import ASTRAY_MAX
from simulator.ghost.ghost import Ghost
from simulator.ghost.liveness import Liveness
from simulator.ghost.probes.watching import watching
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World
from tests.kit.refusals import may_refuse
from tests.planted.plugin import Plants

ROOT, VIEW = 0x1000, ("vm", 1, 0)
GPA, PAGE = 0x10_0000, 0x1000


def heard(verdicts: Verdicts) -> list[str]:
    return [violation.invariant for violation in verdicts.found]


def lending() -> Ghost:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 4, VIEW, "vm1")
    ghost.root_lent(ROOT)
    return ghost


# -- what it is told -------------------------------------------------------------------------------------


def test_a_fault_maps_into_no_obsolete_root() -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 4, VIEW, "vm1")
    ghost.faults.maps_into(ROOT)
    assert heard(ghost.verdicts) == []
    ghost.root_obsolete(ROOT)
    ghost.faults.maps_into(ROOT)
    assert heard(ghost.verdicts) == ["R3"]


def test_nobody_is_given_an_obsolete_root() -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 4, VIEW, "vm1")
    ghost.faults.given(ROOT)
    assert heard(ghost.verdicts) == []
    ghost.root_obsolete(ROOT)
    ghost.faults.given(ROOT)
    assert heard(ghost.verdicts) == ["R3"]


def test_a_fault_is_tried_again_for_a_reason() -> None:
    ghost = Ghost(Verdicts())
    before = ghost.heard.changes
    ghost.lets_go("vm1", "mm", 0, 1)
    ghost.faults.tried(0, before, ghost.heard.changes)
    assert heard(ghost.verdicts) == []
    ghost.faults.tried(0, ghost.heard.changes, ghost.heard.changes)
    assert heard(ghost.verdicts) == ["R2"]


@pytest.mark.parametrize(("met_frozen", "wrong"), [(True, []), (False, ["R27"])])
def test_a_fault_waits_for_no_flush_of_others(met_frozen: bool, wrong: list[str]) -> None:
    ghost = Ghost(Verdicts())
    ghost.faults.waits_for_acks(0, met_frozen=met_frozen)
    assert heard(ghost.verdicts) == wrong


@pytest.mark.parametrize(
    ("there", "need", "wrong"), [(0, READ, False), (READ, WRITE, False), (READ, READ, True)]
)
def test_a_fault_fails_only_where_nothing_is(there: int, need: int, wrong: bool) -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, None, "vm1")
    ghost.entry_stored(ROOT, 0x500 << 12 | there)
    ghost.faults.failed(ROOT, 0, need)
    assert heard(ghost.verdicts) == (["I8"] if wrong else [])


@pytest.mark.parametrize(("there", "wrong"), [(0, False), (READ, False), (READ | WRITE, True)])
def test_a_right_that_came_is_there_for_who_asks(there: int, wrong: bool) -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, None, "vm1")
    ghost.entry_stored(ROOT, 0x500 << 12 | there)
    ghost.faults.is_not_granted(ROOT, 0, WRITE)
    assert heard(ghost.verdicts) == (["R20"] if wrong else [])


def test_a_pointer_leads_astray_for_a_while() -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, None, "vm1")
    ghost.entry_stored(ROOT, 0x500 << 12 | READ | WRITE)
    for since in (7, 9):  # two pointers, one after the other
        for _ in range(ASTRAY_MAX):
            ghost.faults.is_not_granted(ROOT, 0, WRITE, since)
    assert heard(ghost.verdicts) == []
    ghost.faults.is_not_granted(ROOT, 0, WRITE, 9)
    assert heard(ghost.verdicts) == ["R6"]


@pytest.mark.parametrize(
    ("asker", "has", "wrong"),
    [("mm1", 0x500, False), ("mm2", 0x500, False), ("mm2", 0x501, True), ("mm3", 0, True)],
)
def test_what_is_faulted_in_is_what_the_asking_process_has(asker: str, has: int, wrong: bool) -> None:
    """A child has its parent's page until one of them stores."""
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, VIEW, "vm1")
    ghost.shows(VIEW, 0, 1, Shown("mm1", 0, READ | WRITE))
    for process, frame in (("mm1", 0x500), (asker, has)):
        ghost.backs(process, 0, 1, Translation(frame, READ) if frame else None)
    ghost.entry_stored(ROOT, 0x500 << 12 | READ)
    ghost.faults.came(ROOT, VIEW, 0, asker)
    assert heard(ghost.verdicts) == (["I11"] if wrong else [])


def test_a_view_lends_one_root_at_a_time() -> None:
    ghost = lending()
    ghost.root_taken_back(ROOT)
    ghost.root_lent(ROOT)
    assert heard(ghost.verdicts) == []
    ghost.root_lent(ROOT)
    assert heard(ghost.verdicts) == ["I10"]


@pytest.mark.parametrize("leases", [0, 1])
def test_an_export_ends_behind_its_leases(leases: int) -> None:
    ghost = lending()
    ghost.lent.ends(VIEW, leases=leases)
    assert heard(ghost.verdicts) == ["I13"] * leases


def test_a_vcpu_does_not_leave_the_root_that_is_lent() -> None:
    ghost = lending()
    ghost.lent.runs_on(0, VIEW, 4)
    ghost.lent.runs_on(0, ("vm", 2, 0), 5)
    assert heard(ghost.verdicts) == []
    ghost.lent.runs_on(0, VIEW, 5)
    assert heard(ghost.verdicts) == ["I10"]


def test_what_is_lent_as_write_back_memory_stays_so() -> None:
    ghost = lending()
    ghost.lent.snoops_no_more(VIEW)
    assert heard(ghost.verdicts) == ["R15"]
    ghost.process_gone("kvmd")
    ghost.lent.snoops_no_more(VIEW)
    assert len(ghost.verdicts.found) == 1


def test_an_entry_is_one_store() -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, None, "vm1")
    ghost.entry_stored(ROOT, 0x500 << 12 | READ)
    ghost.entry_stored(ROOT, 0x501 << 12 | READ, pieces=2)
    assert heard(ghost.verdicts) == ["I4"]


def test_no_root_is_left_behind_its_last_user() -> None:
    ghost = lending()
    ghost.root_left(ROOT + PAGE)
    assert heard(ghost.verdicts) == []
    ghost.root_left(ROOT)
    assert heard(ghost.verdicts) == ["I7"]


@pytest.mark.parametrize("told", [False, True])
def test_what_a_dead_driver_s_units_hold_is_not_given_up(told: bool) -> None:
    """Its own table, of a process's page."""
    ghost = Ghost(Verdicts())
    ghost.frames_taken(0x500, 1, "mm1")
    ghost.table_taken(ROOT, "iommufdd")
    ghost.root_made(ROOT, 1, None, "hwpt")
    ghost.entry_stored(ROOT, 0x500 << 12 | READ)
    ghost.cached(("iotlb", "unit0"), ROOT, 0, 1, Translation(0x500, READ))
    ghost.process_gone("iommufdd")
    ghost.process_gone("qemu_shim")  # which is no driver of units
    if told:
        ghost.keeps(("iotlb", "unit0"), [])
        ghost.unplugged()
    ghost.frames_given_up(0x500, 1)
    assert heard(ghost.verdicts) == ([] if told else ["I13"])


def test_a_page_that_another_lets_go_of_is_pinned_for_a_gfn_until_that_one_is() -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        world = World()
        _faults(world)
        world.lend()
        pinning, gfn = world.vm.pinning, Gfn(GPA >> 12)
        world.do(pinning.pin(pinning.open(), GfnSpan.of_pages(gfn, 1)))
        slot = world.vm.slots.find(gfn)
        assert slot is not None
        others = world.do(world.mm.pin_user_page(slot.hva_of(gfn)))
        pages = pinning.forget(slot)
        assert pages == [others]
        world.mm.unpin(others)
        assert [page for _, page, _ in ghost.backing.pinned_frames()] == [gfn]
        pinning.put(pages)
        assert list(ghost.backing.pinned_frames()) == []


@pytest.mark.parametrize(("given_up", "wrong"), [(True, False), (False, True)])
def test_what_is_pinned_is_not_replaced_at_once(given_up: bool, wrong: bool) -> None:
    """As a copy on write does; who gives the page up himself wants another."""
    ghost = Ghost(Verdicts())
    ghost.backs("mm", 0x80, 0x81, Translation(0x500, READ | WRITE))
    ghost.pinned("mm", 0x80, 0x500)
    if given_up:
        ghost.backs("mm", 0x80, 0x81, None)
    ghost.backs("mm", 0x80, 0x81, Translation(0x600, READ | WRITE))
    assert heard(ghost.verdicts) == (["I22"] if wrong else [])


@pytest.mark.parametrize(("entries", "wrong"), [(0, False), (1, True)])
def test_a_frame_whose_memory_failed_stays_while_entries_say_so(entries: int, wrong: bool) -> None:
    ghost = Ghost(Verdicts())
    ghost.frames_taken(0x500, 1, "mm1")
    ghost.backing.failed(0x500, 1)
    ghost.backing.failed(0x500, entries - 1)
    ghost.frames_given_up(0x500, 1)
    assert heard(ghost.verdicts) == (["I21"] if wrong else [])


def test_where_a_daemon_waits_for_another_that_is_what_has_not_ended() -> None:
    verdicts = Verdicts()
    liveness = Liveness(verdicts, bound=1)
    liveness.begins(0, "fault", 1)
    liveness.begins(0, "request", 2)
    liveness.stuck()
    assert heard(verdicts) == ["R27", "R2"]


# -- the product as it would be wrong ----------------------------------------------------------------------


def _ram(world: World) -> None:
    world.set_slot(0, 0x100, 4, world.map(4))


def _faults(world: World) -> None:
    _ram(world)
    world.guest_write(world.create_vcpu(0), GPA, b"cpu's")


def _slot_goes(world: World) -> None:
    """The other vCPU keeps the old root there."""
    _faults(world)
    world.guest_write(world.create_vcpu(1), GPA, b"other's")
    world.set_slot(1, 0x200, 1, world.map(1))
    world.set_slot(1, 0x200, 0, 0)
    world.guest_write(world.vm.vcpus[0], GPA, b"again")


def _both(world: World) -> None:
    _faults(world)
    exported = world.export()
    world.io_fault(exported, GPA >> 12)


def _lend_twice(world: World) -> None:
    _faults(world)
    world.export()
    world.export()


def _another_width(world: World) -> None:
    _faults(world)
    world.export()
    world.create_vcpu(1, 52)


def _noncoherent(world: World) -> None:
    _faults(world)
    world.export()
    world.vm.exports.register_noncoherent_dma()


def _ends(world: World) -> None:
    _faults(world)
    world.do(world.vm.destroy())


def _pinned_slot_goes(world: World) -> None:
    _faults(world)
    exported = world.lend()
    pins = world.vm.pinning.open()
    world.do(world.vm.pinning.pin(pins, GfnSpan.of_pages(Gfn(GPA >> 12), 1)))
    world.do(world.vm.slots_change.set_memory_region(world.region(0, 0x100, 0, 0)))
    assert exported.root.exported


def _pinned_and_forked(world: World) -> None:
    _faults(world)
    world.lend()
    pins = world.vm.pinning.open()
    world.do(world.vm.pinning.pin(pins, GfnSpan.of_pages(Gfn(GPA >> 12), 1)))
    world.do(fork(world.mm, world.host.create_mm()))


def _beside_a_slow_flush(world: World) -> None:
    """Who stores to a shared page takes it away, and so waits (B-18); another store does not."""
    _faults(world)
    world.do(fork(world.mm, world.host.create_mm()))
    copies = world.create_vcpu(1)
    world.export().register_importer("slow", SlowImporter())
    world.start(world.vm.flusher.flush(None))
    world.start(copies.run([("w", GPA, b"its own")]))
    world.start(world.vm.vcpus[0].run([("w", GPA + PAGE, b"other page's")]))


CASES: dict[str, tuple[Callable[[World], None], str]] = {
    "R2-sequence-of-32-bits": (_faults, "R2"),
    "R3-vcpu-keeps-its-root": (_slot_goes, "R3"),
    "R3-obsolete-root-is-found": (_slot_goes, "R3"),
    "B-26-faults-wait-for-acks": (_beside_a_slow_flush, "R27"),
    "B-13-spurious-is-an-error": (_both, "I8"),
    "B-02-two-critical-sections": (_lend_twice, "I10"),
    "B-28-vcpu-of-another-width": (_another_width, "I10"),
    "B-27-noncoherent-later": (_noncoherent, "R15"),
    "B-23-roots-left-at-the-end": (_ends, "I7"),
    "R14-torn-store": (_faults, "I4"),
    "pins-forgotten-with-nobody": (_pinned_slot_goes, "I22"),
    "R22-fork-shares-what-is-pinned": (_pinned_and_forked, "I22"),
}


def played(story: Callable[[World], None]) -> list[str]:
    ghost = Ghost(Verdicts())
    with watching(ghost), suppress(AssertionError), may_refuse(errno.EEXIST, errno.EINVAL, errno.EBUSY):
        story(World(CpuFeatures(maxphyaddr=52, ept_levels=5), seq_start=1 << 31))
    return heard(ghost.verdicts)


@pytest.mark.parametrize("bug", CASES)
def test_what_is_planted_is_seen_at_its_step(bug: str, plant: Plants) -> None:
    story, invariant = CASES[bug]
    assert played(story) == []
    plant(bug)
    assert played(story)[:1] == [invariant]
