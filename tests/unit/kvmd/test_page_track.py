"""Write tracking: a tracked gfn is writable for nobody, a CPU's store is emulated, a device's refused."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import IO_ERRNO, FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.slots.page_track import MAX_COUNT, PageTrack
from kvmd.core.stats import vm_stats
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import Gfn, Gpa, Hva
from tests.kit.kvmd import READ, WRITE, World
from tests.kit.lent import Lent

RAM, PAGE = 0x10_0000, 4096
READ_WRITE = TdpFaultType(read=True, write=True, exec=False)


class Tracked(Lent):
    """Gfns 0x200..0x3ff on one 2 MiB page."""

    def __init__(self, *, level: int = 2, **host: Any) -> None:
        super().__init__(0x200, 512, level=level, **host)

    def track(self, gfn: int) -> None:
        self.do(self.vm.write_track.add(Gpa(gfn << 12)))

    def untrack(self, gfn: int) -> None:
        self.run(self.vm.write_track.remove(Gpa(gfn << 12)))

    def store(self, gfn: int, data: bytes = b"x") -> None:
        assert self.guest_write(self.vcpu, gfn << 12, data).done

    def rights(self, gfn: int) -> bool | None:
        found = self.table().get(gfn)
        return None if found is None else found[1]


@pytest.mark.rfc("RFC-86")
def test_tracking_splits_what_is_huge_protects_one_page_and_waits_for_the_acks() -> None:
    guest = Tracked()
    guest.store(0x205)
    assert guest.exported.root.leaves == [0, 0, 1, 0]
    wait = guest.start(guest.vm.write_track.add(Gpa(0x205 << 12)))
    assert guest.importer.heard == [(0x205 << 12, PAGE, 1)]
    assert not wait.done
    guest.ack(guest.importer)
    assert wait.done
    assert guest.exported.root.leaves == [0, 512, 0, 0]
    assert [gfn for gfn in range(0x200, 0x400) if not guest.rights(gfn)] == [0x205]
    assert check_vm(guest.vm) == []


def test_the_short_way_to_w_is_shut_for_a_tracked_page() -> None:
    """A fast page fault gives W back wherever the entry says the MMU would."""
    guest = Tracked()
    guest.store(0x205)
    guest.track(0x205)
    entries = {met.gfn: met.entry for met in guest.vm.mmu.leaves(guest.exported.root)}
    assert entries[Gfn(0x205)] & (bits.WRITE | bits.MMU_WRITABLE) == 0
    assert entries[Gfn(0x204)] & bits.MMU_WRITABLE


def test_a_page_of_1_gib_is_split_along_the_way_only() -> None:
    world = World(frames_gib=2)
    world.set_slot(0, 1 << 18, 1 << 18, world.map(1, 3))
    vcpu = world.create_vcpu()
    world.guest_write(vcpu, 1 << 30, b"x")
    world.run(world.vm.write_track.add(Gpa((1 << 30) + 5 * PAGE)))
    assert world.vm.mmu.roots[0].leaves == [0, 512, 511, 0]
    assert check_vm(world.vm) == []


def test_without_room_to_split_the_whole_leaf_is_protected() -> None:
    guest = Tracked(tables=3 * PAGE)
    guest.store(0x205)
    guest.track(0x205)
    assert guest.exported.root.leaves == [0, 0, 1, 0]
    assert not any(guest.rights(gfn) for gfn in range(0x200, 0x400))
    guest.store(0x205, b"still")
    assert guest.run(guest.mm.read(Hva(guest.hva + 5 * PAGE), 5)) == b"still"
    assert check_vm(guest.vm) == []


def test_a_tracked_store_is_emulated_logged_and_counted_and_the_entry_stays_read_only() -> None:
    guest, logged = Tracked(), []
    guest.vm.dirty_log.mark = lambda slot, gfn, *who: logged.append(gfn)  # type: ignore[method-assign]
    guest.guest_read(guest.vcpu, 0x205 << 12, 1)
    guest.track(0x205)
    before = vm_stats(guest.vm)["pf_emulate"]
    guest.store(0x205, b"tracked")
    assert guest.run(guest.mm.read(Hva(guest.hva + 5 * PAGE), 7)) == b"tracked"
    assert guest.guest_read(guest.vcpu, 0x205 << 12, 7).reads == [b"tracked"]
    assert guest.rights(0x205) is False
    assert logged == [0x205]
    assert vm_stats(guest.vm)["pf_emulate"] == before + 1


def test_what_is_faulted_in_around_a_tracked_page_is_small_and_the_page_read_only() -> None:
    guest = Tracked()
    guest.run(guest.mm.write(guest.hva, b"the page is its own, not zeroes shared"))
    guest.track(0x205)
    for gfn in (0x204, 0x205):
        assert guest.guest_read(guest.vcpu, gfn << 12, 1).done
    assert guest.exported.root.leaves == [0, 2, 0, 0]
    assert (guest.rights(0x204), guest.rights(0x205)) == (True, False)
    assert check_vm(guest.vm) == []


@pytest.mark.rfc("RFC-73")
@pytest.mark.defect("B-24")
@pytest.mark.parametrize("kind", [WRITE, READ_WRITE])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_device_s_write_is_refused_at_once_whatever_else_it_asks(kind: TdpFaultType, mapped: bool) -> None:
    """The series looked at W only when the request had R, too, and mapped the page before it said no."""
    guest = Tracked()
    guest.track(0x205)
    if mapped:
        assert guest.io_fault(guest.exported, 0x205, READ) is FaultResult.FIXED
    for _ in range(3):
        assert guest.io_fault(guest.exported, 0x205, kind) is FaultResult.TRACKED
    assert guest.rights(0x205) is (False if mapped else None)
    assert IO_ERRNO[FaultResult.TRACKED] == errno.EINVAL
    assert guest.vm.fault_path.retries == 0


def test_a_device_s_read_gets_the_page_without_w() -> None:
    guest = Tracked()
    guest.track(0x205)
    assert guest.io_fault(guest.exported, 0x205, READ) is FaultResult.FIXED
    assert guest.rights(0x205) is False


def test_the_check_finds_a_tracked_page_that_somebody_made_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the fault path does not ask."""
    guest = Tracked(level=1)
    guest.track(0x205)
    monkeypatch.setattr(guest.vm.page_track, "is_tracked", lambda slot, gfn: False)
    guest.store(0x205)
    assert [found.split(":")[0] for found in check_vm(guest.vm)] == ["I19"]


def test_counts_are_kept_and_the_last_one_gives_the_page_back() -> None:
    guest = Tracked()
    guest.track(0x205)
    guest.track(0x205)
    guest.untrack(0x205)
    guest.store(0x205)
    assert not guest.rights(0x205)
    guest.untrack(0x205)
    guest.store(0x205)
    assert guest.rights(0x205)
    with pytest.raises(UapiError) as caught:
        guest.untrack(0x205)
    assert caught.value.errno == errno.EINVAL


def test_counts_go_with_the_slot_when_it_is_deleted_or_moved() -> None:
    guest = Tracked(level=1)
    guest.track(0x205)
    guest.set_slot(0, 0x600, 512, guest.hva)
    guest.store(0x605)
    assert guest.rights(0x605)
    guest.track(0x606)
    for gfn, pages in ((0, 0), (0x600, 512)):
        guest.change_slot(0, gfn, pages, guest.hva)
    guest.store(0x606)
    assert guest.rights(0x606)


def test_a_flags_change_keeps_the_counts() -> None:
    guest = Tracked(level=1)
    guest.track(0x205)
    change = guest.start(
        guest.vm.slots_change.set_memory_region(guest.region(0, 0x200, 512, guest.hva, flags=1))
    )
    guest.ack(guest.importer)
    change.result()
    guest.store(0x205)
    assert not guest.rights(0x205)


def test_what_cannot_be_tracked_is_einval() -> None:
    guest = Tracked()
    for wrong in (guest.vm.write_track.add, guest.vm.write_track.remove):
        with pytest.raises(UapiError) as caught:
            guest.run(wrong(Gpa(0x999_9000)))
        assert caught.value.errno == errno.EINVAL
    slot = guest.vm.slots.find(Gfn(0x205))
    assert slot is not None
    track = PageTrack()
    for _ in range(MAX_COUNT):
        track.add(slot, Gfn(0x205))
    with pytest.raises(UapiError):
        track.add(slot, Gfn(0x205))
