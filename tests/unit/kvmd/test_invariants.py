"""Each invariant across kvmd's objects, broken on purpose, is found by its number."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmd.core.invariants import check_vm
from kvmd.core.slots.memslot import Memslot, SlotFlag
from kvmd.core.tables.tdp_table import RootEvent, RootState
from protocol.units import Gfn, Hva, Level, Pfn
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World

PAGE = 4096


@pytest.fixture
def world() -> World:
    made = World()
    made.set_slot(0, 0x100, 16, made.map(16))
    made.set_slot(1, 0x200, 512, made.map(1, 2))
    made.export()
    for gpa in (0x10_0000, 0x10_1000, 0x20_0000):
        made.guest_write(made.vm.vcpus[0], gpa, b"x")
    assert check_vm(made.vm) == []
    return made


def numbers(world: World) -> set[str]:
    return {sentence.split(":")[0] for sentence in check_vm(world.vm)}


def test_a_page_that_is_writable_with_its_bit_clear_is_found(world: World) -> None:
    """I20: its root is lent, so no D tells."""
    slot = world.vm.slots.find(Gfn(0x100))
    assert slot is not None
    world.set_slot(0, 0x100, 16, slot.hva, 1)
    assert numbers(world) == set()
    change(world, 0x100, 1, lambda entry: entry | 2)
    assert numbers(world) == {"I20"}
    world.guest_write(world.vm.vcpus[0], 0x10_2000, b"x")
    logging = world.vm.slots.find(Gfn(0x100))
    assert logging is not None
    assert logging.dirty is not None
    logging.dirty.mark(0)
    assert numbers(world) == set()
    logging.dirty.take()
    assert numbers(world) == {"I20", "I25"}


def entry_of(world: World, gfn: int, level: int) -> int:
    """Offset in table memory of an entry, by following the bytes."""
    table = world.vm.mmu.roots[0].hpa - 0x10_0000
    for at in range(4, level, -1):
        table = (peek(world, table + 8 * (gfn >> 9 * (at - 1) & 511)) & 0xF_FFFF_FFFF_F000) - 0x10_0000
    return table + 8 * (gfn >> 9 * (level - 1) & 511)


def peek(world: World, at: int) -> int:
    value: int = struct.unpack_from("<Q", world.bare.tables, at)[0]
    return value


def change(world: World, gfn: int, level: int, edit: Callable[[int], int]) -> None:
    at = entry_of(world, gfn, level)
    struct.pack_into("<Q", world.bare.tables, at, edit(peek(world, at)))


@pytest.mark.rfc("RFC-27", "RFC-28")
@pytest.mark.parametrize(
    ("gfn", "level", "edit", "number"),
    [
        (0x100, 1, lambda e: e | 1 << 11, "I2"),
        (0x100, 3, lambda e: e | 1 << 11, "I2"),
        (0x100, 1, lambda e: e & ~(1 << 59), "I3"),
        (0x100, 1, lambda e: e & ~7, "I3"),
        (0x100, 1, lambda e: e | 1 << 62, "I17"),
        (0x200, 2, lambda e: e | 1 << 13, "I17"),
        (0x100, 2, lambda e: 0x0800_0000_0010_0107, "I18"),
        (0x100, 1, lambda e: e + 0x5000, "I11"),  # another frame
        (0x105, 1, lambda e: 0x0E00_0001_0000_9377, "I11"),  # the host has no page there
        (0x110, 1, lambda e: 0x0E00_0001_0000_9377, "I11"),  # no slot
        (0x105, 1, lambda e: 0x0E00_0001_0000_9377, "I16"),  # one leaf more than is counted
        (0x100, 1, lambda e: 0, "I16"),
    ],
)
def test_a_broken_entry_is_found(
    world: World, gfn: int, level: int, edit: Callable[[int], int], number: str
) -> None:
    change(world, gfn, level, edit)
    assert number in numbers(world)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_table_counted_at_another_level_is_found(world: World, level: int) -> None:
    tables_at = world.vm.mmu.roots[0].tables_at
    tables_at[level] += 1
    tables_at[5] -= 1
    assert numbers(world) == {"I16"}


def test_more_rights_than_the_slot_has_are_found(world: World) -> None:
    world.set_slot(2, 0x500, 1, world.map(1), flags=2)
    world.guest_read(world.vm.vcpus[0], 0x50_0000, 1)
    assert check_vm(world.vm) == []
    change(world, 0x500, 1, lambda entry: entry | 2)
    assert numbers(world) == {"I11"}


def test_a_huge_leaf_that_reaches_beyond_its_slot_or_host_page_is_found(world: World) -> None:
    slot = world.vm.slots.find(Gfn(0x200))
    assert slot is not None
    short = Memslot(1, 0, slot.base_gfn, 511, slot.hva, SlotFlag(0))
    world.vm.slots.replace(slot, short)
    assert numbers(world) == {"I11"}
    world.vm.slots.replace(short, slot)
    assert numbers(world) == set()
    page = world.mm.present_page(slot.hva)
    assert page is not None
    page.level = Level(1)
    assert numbers(world) == {"I11"}


def test_a_page_that_moved_without_notice_is_found(world: World) -> None:
    slot = world.vm.slots.find(Gfn(0x100))
    assert slot is not None
    page = world.mm.present_page(slot.hva)
    assert page is not None
    page.pfn = Pfn(page.pfn + 7)
    assert numbers(world) == {"I11"}


def test_a_slot_that_went_without_a_zap_is_found(world: World) -> None:
    world.vm.slots.replace(world.vm.slots.find(Gfn(0x100)), None)
    assert numbers(world) == {"I11"}


@pytest.mark.parametrize("what", ["moved", "invalid", "unmarked"])
def test_an_exported_root_that_is_not_what_was_lent_is_found(world: World, what: str) -> None:
    root = world.vm.exports.tdps[0].root
    if what == "moved":
        world.vm.exports.tdps[0].root = world.vm.mmu.get_root(type(root.role)(Level(5), 0, True))
        world.vm.exports.tdps[0].root.happens(RootEvent.EXPORT)
    elif what == "invalid":
        root.state = RootState.INVALID
    else:
        root.state = RootState.VALID
    assert "I10" in numbers(world)


def test_table_pages_held_for_no_flush_are_found(world: World) -> None:
    world.host.pool.quarantine(world.vm.id, world.host.pool.allocate(), world.vm.flusher.epoch + 1)
    assert numbers(world) == {"I7"}


def test_pages_held_while_a_flush_is_out_are_no_violation(world: World) -> None:
    importer = SlowImporter()
    world.vm.exports.tdps[0].register_importer("slow", importer)
    world.host.pool.quarantine(world.vm.id, world.host.pool.allocate(), world.vm.flusher.epoch + 1)
    world.start(world.vm.flusher.flush(None))
    assert numbers(world) == set()
    world.ack(importer)
    assert numbers(world) == set()
    assert world.host.pool.held(world.vm.id) == 0


def test_translations_are_not_judged_while_the_host_is_changing_them(world: World) -> None:
    importer = SlowImporter()
    world.vm.exports.tdps[0].register_importer("slow", importer)
    slot = world.vm.slots.find(Gfn(0x100))
    assert slot is not None
    over = world.start(world.mm.munmap(Hva(slot.hva), 16 * PAGE))
    assert not over.done
    assert numbers(world) == set()
    world.ack(importer)
    assert numbers(world) == set()
