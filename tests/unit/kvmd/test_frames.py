"""Frames: never the same one twice, joined again, zeroed, and ENOMEM when there are none."""

from __future__ import annotations

import errno
import mmap
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.mm.frames import Frames
from protocol.errors import UapiError
from protocol.frame_tags import FrameTags, is_free, tags_size
from protocol.units import GIB, Hpa, Level, Pfn

BASE = Hpa(0x1_0000_0000)
FIRST = 0x10_0000
PAGES = {1: 1, 2: 512, 3: 512 * 512}


class FrameMemory:
    def __init__(self, gib: int = 1) -> None:
        self.map = mmap.mmap(-1, gib * GIB)
        self.tags = FrameTags(BASE, memoryview(bytearray(tags_size(gib * GIB))))
        self.discarded: list[tuple[int, int]] = []
        self.frames = Frames(BASE, memoryview(self.map), self.discard, self.tags)

    def discard(self, offset: int, size: int) -> None:
        self.discarded.append((offset, size))
        self.map.madvise(mmap.MADV_REMOVE, offset, size)

    def take(self, level: int = 1, owner: int = 1) -> int:
        return self.frames.allocate(Level(level), owner)

    def give(self, pfn: int, level: int = 1) -> None:
        self.frames.release(Pfn(pfn), Level(level))


def test_blocks_are_aligned_to_their_size_and_inside_the_window() -> None:
    memory = FrameMemory(2)
    for level in (1, 2, 1, 3, 2, 1):
        pfn = memory.take(level)
        assert pfn % PAGES[level] == 0
        assert FIRST <= pfn <= pfn + PAGES[level] <= FIRST + 2 * PAGES[3]


@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2]), st.booleans(), st.integers(0, 1 << 16)), max_size=60)
)
def test_no_two_blocks_ever_overlap(steps: list[tuple[int, bool, int]]) -> None:
    memory, live = FrameMemory(), list[tuple[int, int]]()
    for level, take, pick in steps:
        if take or not live:
            pfn = memory.take(level)
            for other, size in live:
                assert pfn + PAGES[level] <= other or other + size <= pfn
            live.append((pfn, PAGES[level]))
        else:
            pfn, size = live.pop(pick % len(live))
            memory.give(pfn, 1 if size == 1 else 2)
        assert memory.frames.in_use == sum(size for _, size in live)


def test_children_that_are_all_free_join_again() -> None:
    """512 small frames, freed in any order, are one 2 MiB block; 512 of those are 1 GiB again."""
    memory, random = FrameMemory(), Random(5)
    small = [memory.take() for _ in range(512)]
    large = [memory.take(2) for _ in range(511)]
    with pytest.raises(UapiError):
        memory.take()
    random.shuffle(small)
    for pfn in small[:-1]:
        memory.give(pfn)
    with pytest.raises(UapiError):
        memory.take(2)
    memory.give(small[-1])
    assert memory.take(2) == min(small)
    random.shuffle(large)
    for pfn in large:
        memory.give(pfn, 2)
    with pytest.raises(UapiError):
        memory.take(3)
    memory.give(min(small), 2)
    assert memory.take(3) == FIRST


def test_without_a_free_block_it_is_enomem_and_nothing_is_taken() -> None:
    memory = FrameMemory()
    memory.take(3)
    for level in (1, 2, 3):
        with pytest.raises(UapiError) as caught:
            memory.take(level)
        assert caught.value.errno == errno.ENOMEM
    assert memory.frames.in_use == PAGES[3]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_frame_given_up_comes_back_zeroed(level: int) -> None:
    memory = FrameMemory()
    pfn = memory.take(level)
    at = memory.frames.offset_of(Pfn(pfn))
    size = PAGES[level] * 4096
    memory.map[at : at + 8] = b"\xff" * 8
    memory.map[at + size - 8 : at + size] = b"\xff" * 8
    memory.give(pfn, level)
    assert memory.map[at : at + 8] == memory.map[at + size - 8 : at + size] == bytes(8)
    assert memory.take(level) == pfn
    assert memory.discarded == ([] if level == 1 else [(at, size)])


def test_a_tag_changes_when_a_frame_changes_hands_and_only_then() -> None:
    memory = FrameMemory()
    pfn, other = memory.take(owner=3), memory.take(owner=4)
    tag, other_tag = memory.tags.read(pfn), memory.tags.read(other)
    assert tag & 0xFFFF == 3
    memory.give(pfn)
    assert is_free(memory.tags.read(pfn))
    assert memory.tags.read(other) == other_tag
    again = memory.take(owner=3)
    assert again == pfn
    assert memory.tags.read(pfn) not in (tag, 0)
    large = memory.take(2, owner=9)
    assert {memory.tags.read(large + i) & 0xFFFF for i in (0, 1, 511)} == {9}


def test_nothing_is_touched_that_nobody_asked_for() -> None:
    """Many GiB of frames cost nothing until they are used."""
    before = resident()
    memory = FrameMemory(8)
    memory.take()
    assert resident() - before < 256 << 20


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096
