"""Guest RAM: pages handed out once, and accesses cut so that no message is too large."""

from __future__ import annotations

import pytest

from protocol.units import Gpa
from qemu_shim.guest.memory import (
    MAX_ACCESS_BYTES,
    MAX_BATCH_BYTES,
    GuestMemory,
    OutOfGuestMemory,
)
from tests.unit.qemu_shim.guest.guests import PAGE, Ram


def test_pages_are_handed_out_once_untouched_and_one_after_the_other() -> None:
    ram = Ram()
    memory = ram.memory(PAGE)
    assert [memory.allocate(n) for n in (1, 3, 1)] == [PAGE, 2 * PAGE, 5 * PAGE]
    assert ram.batches == []


def test_an_alignment_skips_pages_and_hands_them_out_never() -> None:
    memory = Ram().memory(PAGE)
    assert memory.allocate(1, alignment=8 * PAGE) == 8 * PAGE
    assert memory.allocate(1) == 9 * PAGE


def test_ram_ends_where_it_ends() -> None:
    memory = GuestMemory(Ram(), Gpa(PAGE), Gpa(4 * PAGE))
    with pytest.raises(OutOfGuestMemory, match="4 pages"):
        memory.allocate(4)
    assert memory.allocate(3) == PAGE, "a refusal takes nothing"
    with pytest.raises(OutOfGuestMemory, match="0x4000"):
        memory.allocate(1)


@pytest.mark.parametrize(
    "size",
    [1, MAX_ACCESS_BYTES, MAX_ACCESS_BYTES + 1, MAX_BATCH_BYTES, MAX_BATCH_BYTES + MAX_ACCESS_BYTES + 7],
)
async def test_large_accesses_are_cut_and_lose_no_byte(size: int) -> None:
    ram = Ram(2 * MAX_BATCH_BYTES)
    memory = ram.memory()
    data = bytes(i * 31 % 256 for i in range(size))
    await memory.write(0x1234, data)
    assert ram.bytes[0x1234 : 0x1234 + size] == data
    assert ram.bytes.count(0) >= len(ram.bytes) - size
    assert await memory.read(0x1234, size) == data
    for batch in ram.batches:
        sizes = [len(what) if isinstance(what, bytes) else what for _, what in batch]
        assert max(sizes) <= MAX_ACCESS_BYTES
        assert sum(sizes) <= MAX_BATCH_BYTES


async def test_touching_stores_one_byte_at_each_place() -> None:
    ram = Ram(2048 * PAGE)
    gpas = [n * PAGE for n in range(1500)]
    await ram.memory().touch(gpas)
    assert sum(ram.bytes) == 1500
    assert all(ram.bytes[gpa] == 1 for gpa in gpas)
    assert [len(batch) for batch in ram.batches] == [1024, 476]


async def test_a_page_that_is_made_writable_keeps_what_others_store_meanwhile() -> None:
    """One locked instruction: a load and a store of what it gave would take a device's byte back."""
    ram = Ram()
    await ram.memory().fault_in(3 * PAGE, write=True)
    assert ram.batches == [[(3 * PAGE, b"")]]
    await ram.memory().fault_in(3 * PAGE, write=False)
    assert ram.batches[1:] == [[(3 * PAGE, 1)]]
