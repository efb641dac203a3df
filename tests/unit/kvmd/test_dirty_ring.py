"""The dirty ring: its bytes, who may touch an entry when, and how full is full."""

from __future__ import annotations

import fcntl
import os
import struct
from random import Random

import pytest

from kvmd.core.slots.dirty_ring import DIRTY_GFN_BYTES, DirtyGfn, DirtyRing, reserved_entries
from protocol.kernel.linux import LINUX
from qemu_shim.vmm.dirty_ring import DirtyRing as Harvester

BYTES = 4096


def pair(reserved: int = 64) -> tuple[DirtyRing, Harvester, memoryview]:
    """KVM's side, user space's side, and the bytes between them."""
    fd = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    harvester = Harvester(LINUX, fd, BYTES)
    memory = harvester._mapping.view
    return DirtyRing(memory, reserved), harvester, memory


def test_an_entry_is_struct_kvm_dirty_gfn() -> None:
    ring, _, memory = pair()
    ring.push(0x1_0005, 0x12_3456_789A)
    assert bytes(memory[:16]) == struct.pack("<IIQ", 1, 0x1_0005, 0x12_3456_789A)
    assert bytes(memory[16:]) == bytes(BYTES - 16)


def test_an_entry_comes_back_only_after_user_space_gave_it_back() -> None:
    ring, harvester, memory = pair()
    for page in range(3):
        ring.push(1, page)
    assert ring.take_back() == []
    assert harvester.harvest() == [(1, 0), (1, 1), (1, 2)]
    assert harvester.harvest() == []
    assert ring.take_back() == [DirtyGfn(1, 0), DirtyGfn(1, 1), DirtyGfn(1, 2)]
    assert ring.used == 0
    assert [bytes(memory[i * 16 : i * 16 + 4]) for i in range(3)] == [bytes(4)] * 3


def test_a_hole_in_what_was_given_back_stops_kvm() -> None:
    """Entries are taken in ring order: a later one waits for an earlier one."""
    ring, _, memory = pair()
    for page in range(3):
        ring.push(1, page)
    for index in (0, 2):
        memory[index * 16 : index * 16 + 4] = struct.pack("<I", 2)
    assert ring.take_back() == [DirtyGfn(1, 0)]
    memory[16:20] = struct.pack("<I", 3)  # DIRTY left set beside RESET: given back all the same
    assert ring.take_back() == [DirtyGfn(1, 1), DirtyGfn(1, 2)]


@pytest.mark.parametrize(("pml", "entries"), [(False, 64), (True, 576)])
def test_the_reserve_counts_what_the_cpu_may_still_log(pml: bool, entries: int) -> None:
    assert reserved_entries(pml=pml) == entries


def test_a_ring_is_full_when_only_the_reserve_is_left() -> None:
    ring, harvester, _ = pair()
    for page in range(BYTES // DIRTY_GFN_BYTES - 64):
        assert not ring.soft_full
        ring.push(1, page)
    assert ring.soft_full
    harvester.harvest()
    assert ring.soft_full, "harvested is not yet taken back"
    ring.take_back()
    assert not ring.soft_full


def test_without_room_nothing_is_overwritten() -> None:
    ring, harvester, _ = pair()
    assert [ring.push(1, page) for page in range(257)] == [True] * 256 + [False]
    assert harvester.harvest() == [(1, page) for page in range(256)]


def test_both_sides_agree_however_often_the_ring_wraps() -> None:
    ring, harvester, _ = pair()
    random, pushed, seen, back = Random(1), 0, 0, 0
    for _ in range(3000):
        what = random.random()
        if what < 0.9 and not ring.soft_full:
            ring.push(2, pushed)
            pushed += 1
        elif what < 0.95:
            for entry in harvester.harvest():
                assert entry == (2, seen)
                seen += 1
        else:
            for entry in ring.take_back():
                assert entry == (2, back)
                back += 1
    assert pushed > 1000
    assert pushed >= seen >= back == pushed - ring.used


def test_what_user_space_scribbles_is_handed_on_as_it_stands() -> None:
    """The user of `take_back` checks; the ring neither fails nor runs past what was pushed."""
    ring, _, memory = pair()
    ring.push(1, 7)
    memory[:] = b"\xff" * BYTES
    assert ring.take_back() == [DirtyGfn(0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)]
    assert ring.take_back() == []
