"""Table memory: what a reader may not do, and that an entry changes by one store.

The two-process tests use a sealed memfd as kvmd makes it; the child is another interpreter.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from random import Random

import pytest

from protocol.pt.mem import TableOutside, TableReader, TableWriter
from protocol.units import Hpa

BASE = Hpa(0x10_0000)


def writer(pages: int = 2) -> tuple[TableWriter, bytearray]:
    memory = bytearray(pages * 4096)
    return TableWriter(BASE, memoryview(memory)), memory


def test_an_entry_is_eight_little_endian_bytes_at_its_address() -> None:
    tables, memory = writer()
    tables.store64(BASE + 0x1008, 0x0102_0304_0506_0708)
    assert memory[0x1008:0x1010] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert memory.count(0) == len(memory) - 8
    assert tables.load64(BASE + 0x1008) == 0x0102_0304_0506_0708


@pytest.mark.parametrize("hpa", [BASE - 8, BASE - 4096, 0, BASE + 2 * 4096, 1 << 51])
def test_an_address_outside_the_window_is_told_apart(hpa: int) -> None:
    tables, memory = writer()
    memory[:] = b"\xff" * len(memory)
    with pytest.raises(TableOutside):
        tables.load64(hpa)
    with pytest.raises(TableOutside):
        tables.store64(hpa, 1)
    with pytest.raises(TableOutside):
        tables.load_table(Hpa(hpa))
    with pytest.raises(TableOutside):
        tables.fill_unlinked(Hpa(hpa), [0] * 512)
    with pytest.raises(TableOutside):
        tables.clear_unlinked(Hpa(hpa))


def test_a_page_that_is_only_partly_inside_is_outside() -> None:
    tables, _ = writer()
    with pytest.raises(TableOutside):
        tables.load_table(Hpa(BASE + 4096 + 8))


def test_entries_are_counted_by_the_bits_of_one_byte() -> None:
    tables, memory = writer()
    memory[:] = Random(1).randbytes(len(memory))
    for mask, value in ((1 << 59, 1 << 59), (0xFF, 0x37), (3 << 52, 2 << 52), (0x80, 0)):
        entries = tables.load_table(Hpa(BASE + 4096))
        assert tables.count(Hpa(BASE + 4096), mask, value) == sum(e & mask == value for e in entries) > 0
    with pytest.raises(AssertionError, match="more than a byte"):
        tables.count(Hpa(BASE), 0x180, 0x180)


@pytest.mark.parametrize("hpa", [BASE + 1, BASE + 4, BASE + 4095])
def test_an_unaligned_store_is_a_bug(hpa: int) -> None:
    tables, _ = writer()
    with pytest.raises(AssertionError, match="unaligned"):
        tables.store64(hpa, 1)


def test_a_value_wider_than_an_entry_is_refused() -> None:
    tables, memory = writer()
    with pytest.raises(ValueError, match="format"):
        tables.store64(BASE, 1 << 64)
    assert not any(memory)


def test_whole_pages_are_filled_and_cleared() -> None:
    tables, memory = writer()
    tables.fill_unlinked(Hpa(BASE + 4096), range(1, 513))
    assert not any(memory[:4096])
    assert tables.load_table(Hpa(BASE + 4096)) == list(range(1, 513))
    tables.clear_unlinked(Hpa(BASE + 4096))
    assert not any(memory)


def test_a_page_is_filled_before_it_is_linked_or_after_it_was_cleared() -> None:
    """A walker would see it half filled, or empty."""
    tables, memory = writer()
    table = Hpa(BASE + 4096)
    tables.store64(BASE, table | 7)
    with pytest.raises(AssertionError, match="I4: table 0x101000 is linked"):
        tables.fill_unlinked(table, range(512))
    assert not any(memory[4096:])
    tables.store64(BASE, 0)  # cut off, and perhaps cached
    with pytest.raises(AssertionError, match="is linked"):
        tables.fill_unlinked(table, range(512))
    tables.clear_unlinked(table)
    tables.fill_unlinked(table, range(512))
    for entry in (table, 1 << 30 | 7, BASE - 4096 | 7, BASE + 2 * 4096 | 7):  # nothing of ours is linked
        tables.store64(BASE, entry)
    tables.fill_unlinked(table, range(512))


def test_a_page_of_another_size_is_a_bug() -> None:
    tables, _ = writer()
    with pytest.raises(AssertionError, match="entries fill a table page"):
        tables.fill_unlinked(BASE, [0] * 511)


@pytest.mark.parametrize(("base", "size"), [(0x10_0800, 4096), (0x10_0000, 4095)])
def test_a_window_is_whole_pages(base: int, size: int) -> None:
    with pytest.raises(AssertionError, match="window 0x"):
        TableReader(Hpa(base), memoryview(bytearray(size)))


def test_nobody_stores_through_a_read_only_view() -> None:
    memory = bytearray(4096)
    tables = TableWriter(BASE, memoryview(memory).toreadonly())
    with pytest.raises(TypeError):
        tables.store64(BASE, 1)
    with pytest.raises(TypeError):
        tables.clear_unlinked(BASE)


def test_a_reader_has_no_store() -> None:
    assert not hasattr(TableReader(BASE, memoryview(bytearray(4096))), "store64")


CHILD = """
import mmap, os, sys
fd = int(sys.argv[1])
try:
    mmap.mmap(fd, 4096)
    print("mapped writable")
except PermissionError:
    print("refused")
try:
    os.pwrite(fd, b"x", 0)
    print("written")
except PermissionError:
    print("refused")
view = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
print(int.from_bytes(view[8:16], "little"))
"""


def test_another_process_reads_a_sealed_window_and_cannot_write_it() -> None:
    fd = os.memfd_create("tables", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as mapped:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
            with memoryview(mapped) as view:
                tables = TableWriter(BASE, view)
                tables.store64(BASE + 8, 0xDEAD_BEEF)
                child = [sys.executable, "-c", CHILD, str(fd)]
                said = subprocess.run(child, pass_fds=[fd], capture_output=True, text=True, check=True)
                tables.release()
    finally:
        os.close(fd)
    assert said.stdout.split("\n") == ["refused", "refused", str(0xDEAD_BEEF), ""]


class Watched(list[int]):
    """Words that know what was stored to them."""

    def __init__(self, words: int) -> None:
        super().__init__([0] * words)
        self.stores: list[tuple[object, object]] = []

    def __setitem__(self, index: object, value: object) -> None:
        self.stores.append((index, value))


def test_an_entry_is_stored_once_and_whole() -> None:
    tables = TableWriter(BASE, memoryview(bytearray(4096)))
    words = Watched(512)
    tables.words = words  # type: ignore[assignment]
    tables.store64(BASE + 24, 0x0E00_0001_2345_6370)
    assert words.stores == [(3, 0x0E00_0001_2345_6370)]


HAMMER = """
import mmap, sys
view = memoryview(mmap.mmap(int(sys.argv[1]), 4096, prot=mmap.PROT_READ)).cast("Q")
print("ready", flush=True)
seen = set()
looks = 0
while looks < 400000 or (len(seen) < 2 and looks < 50000000):
    seen.add(view[3])
    looks += 1
print(sorted(seen))
"""


def test_a_reader_in_another_process_sees_the_old_value_or_the_new_one() -> None:
    """A store in two halves, or one that zero-fills first, would show a third value.  The reader looks until
    it has seen two, so that it did look between stores."""
    old, new = 0x0E00_0001_2345_6377, 0xF1FF_FFFE_DCBA_9C88
    fd = os.memfd_create("tables", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as mapped, memoryview(mapped) as view:
            tables = TableWriter(BASE, view)
            tables.store64(BASE + 24, old)
            child = [sys.executable, "-c", HAMMER, str(fd)]
            with subprocess.Popen(child, pass_fds=[fd], stdout=subprocess.PIPE, text=True) as reader:
                assert reader.stdout is not None
                reader.stdout.readline()
                while reader.poll() is None:
                    for _ in range(1000):
                        tables.store64(BASE + 24, new)
                        tables.store64(BASE + 24, old)
                seen = reader.stdout.read()
            tables.release()
    finally:
        os.close(fd)
    values = {int(value) for value in seen.strip("[]\n").split(",")}
    assert values == {old, new}
