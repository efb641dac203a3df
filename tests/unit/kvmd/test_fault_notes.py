"""KVM's notes of what its vCPUs faulted in: what is news, who is told, and that nobody waits for it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.faults.fault_notes import MAX_SUBSCRIBERS
from kvmd.core.stats import vm_stats
from protocol.errors import UapiError
from protocol.units import PAGE_SIZE, Gfn, Gpa
from tests.kit.kvmd import READ, World

BASE = 0x200


@dataclass
class Reader:
    """Has room for so many notes."""

    room: int = 1000
    heard: list[tuple[int, int, bool]] = field(default_factory=list)
    closed: bool = False

    def post(self, gfn: Gfn, npages: int, *, writable: bool) -> bool:
        if len(self.heard) == self.room:
            return False
        self.heard.append((gfn, npages, writable))
        return True

    def close(self) -> None:
        self.closed = True


def told(level: int = 1, **fields: int) -> tuple[World, Reader]:
    world = World()
    pages = 16 if level == 1 else 1
    world.set_slot(0, BASE, pages << 9 * (level - 1), world.map(pages, level), **fields)
    world.create_vcpu()
    reader = Reader()
    world.vm.fault_notes.subscribe(reader)
    return world, reader


def test_a_vcpus_fault_is_noted_once_with_what_its_leaf_maps() -> None:
    world, reader = told()
    vcpu = world.vm.vcpus[0]
    world.guest_write(vcpu, (BASE + 3) << 12, b"x")
    world.guest_write(vcpu, (BASE + 3) << 12, b"y")
    world.guest_read(vcpu, (BASE + 5) << 12, 1)  # the zero page, which nobody may write
    assert reader.heard == [(BASE + 3, 1, True), (BASE + 5, 1, False)]


def test_the_note_of_a_huge_leaf_begins_at_its_first_gfn() -> None:
    world, reader = told(level=2)
    world.guest_write(world.vm.vcpus[0], (BASE + 77) << 12, b"x")
    assert reader.heard == [(BASE, 512, True)]


def test_what_was_prefetched_is_noted_and_what_was_there_already_is_no_news() -> None:
    world, reader = told()
    vcpu = world.vm.vcpus[0]
    gpa = Gpa(BASE << 12)
    for _ in range(2):
        world.run(pre_fault_memory(vcpu, world.vm.fault_path, gpa, 2 * PAGE_SIZE, 0))
    assert [gfn for gfn, *_ in reader.heard] == [BASE, BASE + 1]


def test_a_write_that_only_logging_held_up_is_no_news() -> None:
    world, reader = told()
    vcpu = world.vm.vcpus[0]
    exported = world.export()
    world.guest_write(vcpu, BASE << 12, b"x")
    slot = next(iter(world.vm.slots))
    world.set_slot(0, BASE, 16, slot.hva, flags=1)
    world.guest_write(vcpu, BASE << 12, b"y")
    assert vm_stats(world.vm)["pf_fast"] == 1
    assert len(reader.heard) == 1
    assert exported.root.leaves[1] == 1


def test_what_a_device_faulted_in_is_not_noted() -> None:
    world, reader = told()
    exported = world.export()
    world.io_fault(exported, BASE)
    world.io_fault(exported, BASE + 1, READ)
    assert reader.heard == []
    assert vm_stats(world.vm)["notes"] == 0


def test_what_lies_in_the_other_address_space_is_nobodys_business() -> None:
    """System-management RAM: at the same gfn a device has something else."""
    world, reader = told()
    hva = world.map(1)
    world.set_slot(1 << 16, BASE, 1, hva)
    world.run(world.vm.vcpus[0].run([("w", BASE << 12, b"x")], smm=True))
    assert reader.heard == []


def test_a_full_reader_loses_notes_and_nobody_else_does() -> None:
    world, reader = told()
    full = Reader(room=1)
    world.vm.fault_notes.subscribe(full)
    for page in range(3):
        world.guest_write(world.vm.vcpus[0], (BASE + page) << 12, b"x")
    stats = vm_stats(world.vm)
    assert (len(reader.heard), len(full.heard)) == (3, 1)
    assert (stats["notes"], stats["notes_dropped"]) == (4, 2)


def test_one_subscriber_too_many_is_ebusy() -> None:
    world, reader = told()
    for _ in range(MAX_SUBSCRIBERS - 1):
        world.vm.fault_notes.subscribe(Reader())
    with pytest.raises(UapiError) as caught:
        world.vm.fault_notes.subscribe(Reader())
    assert caught.value.errno == errno.EBUSY
    world.vm.fault_notes.unsubscribe(reader)
    world.vm.fault_notes.subscribe(Reader())


def test_the_notes_end_with_the_vm() -> None:
    world, reader = told()
    world.run(world.vm.destroy())
    assert reader.closed


def test_the_notes_of_a_run_name_every_page_once_whoever_else_faults() -> None:
    """As many notes as faults that stored an entry: what the comparison counts."""
    world, reader = told()
    exported = world.export()
    for page in range(0, 16, 3):
        world.io_fault(exported, BASE + page)
    world.run(world.vm.vcpus[0].run([("w", (BASE + page) << 12, b"x") for page in range(16)]))
    expected = [BASE + page for page in range(16) if page % 3]
    assert [gfn for gfn, *_ in reader.heard] == expected
    assert vm_stats(world.vm)["notes"] == vm_stats(world.vm)["pf_fixed"] == len(expected)
