"""Windows of host memory: shared by several sets, gone with their last user."""

from __future__ import annotations

import pytest

from device_sim.core.physmem import PhysicalMemory
from protocol.hostmem import MAX_WINDOWS, WindowKind
from protocol.units import Hpa
from tests.kit.silicon import FRAMES, TABLES, window

SIZE = 0x4000


class Windows:
    """A memory and the windows that were unmapped."""

    def __init__(self) -> None:
        self.memory = PhysicalMemory()
        self.unmapped: list[int] = []

    def add(self, kind: WindowKind, base: int, size: int = SIZE) -> bytearray:
        backing = bytearray(size)
        self.memory.add(window(kind, base, backing), lambda: self.unmapped.append(base))
        return backing


def test_a_frame_is_found_in_its_window_and_nowhere_else() -> None:
    windows = Windows()
    low = windows.add(WindowKind.FRAMES, FRAMES)
    windows.add(WindowKind.TABLES, TABLES)
    low[0x1234] = 0xAB
    place = windows.memory.frame(Hpa(FRAMES + 0x1234))
    assert place is not None
    view, offset = place
    assert view[offset] == 0xAB
    assert windows.memory.frame(Hpa(FRAMES + SIZE - 1)) is not None
    for hpa in (FRAMES - 1, FRAMES + SIZE, TABLES, 0):
        assert windows.memory.frame(Hpa(hpa)) is None, hex(hpa)


def test_tables_are_read_from_the_window_that_holds_them() -> None:
    windows = Windows()
    first = windows.add(WindowKind.TABLES, TABLES)
    second = windows.add(WindowKind.TABLES, TABLES + SIZE)
    windows.add(WindowKind.FRAMES, FRAMES)
    first[0x1008:0x1010] = (0xAA).to_bytes(8, "little")
    second[0x8:0x10] = (0xBB).to_bytes(8, "little")
    reader = windows.memory.tables_at(Hpa(TABLES))
    other = windows.memory.tables_at(Hpa(TABLES + SIZE))
    assert reader is not None
    assert other is not None
    assert (reader.load64(TABLES + 0x1008), other.load64(TABLES + SIZE + 8)) == (0xAA, 0xBB)
    assert windows.memory.tables_at(Hpa(TABLES + 2 * SIZE)) is windows.memory.tables_at(Hpa(FRAMES)) is None


def test_a_window_stays_as_long_as_one_of_its_users() -> None:
    windows = Windows()
    windows.add(WindowKind.FRAMES, FRAMES)
    found = windows.memory.find(WindowKind.FRAMES, Hpa(FRAMES), SIZE)
    assert found is not None
    windows.memory.share(found)
    windows.memory.drop(found)
    assert (windows.unmapped, windows.memory.frame(Hpa(FRAMES)) is None) == ([], False)
    windows.memory.drop(found)
    assert (windows.unmapped, windows.memory.frame(Hpa(FRAMES))) == ([FRAMES], None)
    assert windows.memory.find(WindowKind.FRAMES, Hpa(FRAMES), SIZE) is None


@pytest.mark.parametrize("kind", list(WindowKind))
def test_a_dropped_window_leaves_its_memory_to_others(kind: WindowKind) -> None:
    windows = Windows()
    base = TABLES if kind is WindowKind.TABLES else FRAMES
    backing = windows.add(kind, base)
    found = windows.memory.find(kind, Hpa(base), SIZE)
    assert found is not None
    windows.memory.drop(found)
    backing.append(0)  # a view still held would make this a BufferError
    windows.add(kind, base)
    assert windows.unmapped == [base]


def test_the_same_place_of_another_kind_or_size_is_another_window() -> None:
    windows = Windows()
    windows.add(WindowKind.FRAMES, FRAMES)
    assert windows.memory.find(WindowKind.TABLES, Hpa(FRAMES), SIZE) is None
    assert windows.memory.find(WindowKind.FRAMES, Hpa(FRAMES), SIZE + 0x1000) is None


def test_tags_come_and_go_with_their_window() -> None:
    windows = Windows()
    assert windows.memory.tags is None
    windows.add(WindowKind.FRAMES, FRAMES)
    tags = windows.add(WindowKind.FRAME_TAGS, FRAMES, 64)
    tags[8:16] = (0x70001).to_bytes(8, "little")
    assert windows.memory.tags is not None
    assert windows.memory.tags.read((FRAMES >> 12) + 1) == 0x70001
    found = windows.memory.find(WindowKind.FRAME_TAGS, FRAMES, 64)
    assert found is not None
    windows.memory.drop(found)
    assert windows.memory.tags is None
    assert windows.memory.frame(FRAMES) is not None


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (FRAMES + SIZE - 0x1000, SIZE),
        (FRAMES, 0x1000),
        (FRAMES - 0x1000, SIZE),
        (0, SIZE),
        (0x8000_0000, SIZE),
        (FRAMES + 0x10_0000, 0x1800),
    ],
)
def test_a_window_that_fits_nowhere_is_refused_and_leaves_nothing(base: int, size: int) -> None:
    windows = Windows()
    windows.add(WindowKind.FRAMES, FRAMES)
    backing = bytearray(size)
    refused = window(WindowKind.TABLES, base, backing)
    with pytest.raises(ValueError, match="window"):
        windows.memory.add(refused, lambda: None)
    assert windows.memory.find(WindowKind.TABLES, Hpa(base), size) is None
    assert windows.memory.tables_at(Hpa(base)) is None
    refused.view.release()
    backing.append(0)


def test_tags_that_are_not_whole_words_are_refused() -> None:
    windows = Windows()
    with pytest.raises(ValueError, match="tags"):
        windows.add(WindowKind.FRAME_TAGS, FRAMES, 12)
    assert windows.memory.tags is None


def test_there_are_at_most_64_windows() -> None:
    windows = Windows()
    for n in range(MAX_WINDOWS):
        windows.add(WindowKind.FRAMES, FRAMES + n * SIZE)
    with pytest.raises(ValueError, match="64"):
        windows.add(WindowKind.FRAMES, FRAMES + MAX_WINDOWS * SIZE)
