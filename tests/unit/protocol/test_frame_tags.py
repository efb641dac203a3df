"""Tags: a word that changes whenever a frame changes hands."""

from __future__ import annotations

import struct

import pytest

from protocol.frame_tags import FREE, FrameTags, is_free, tags_size
from protocol.units import Hpa, Pfn

BASE = Hpa(0x1_0000_0000)
FIRST = 0x10_0000


def tags(frames: int = 8) -> tuple[FrameTags, bytearray]:
    memory = bytearray(tags_size(frames * 4096))
    return FrameTags(BASE, memoryview(memory)), memory


def test_a_tag_is_the_owner_below_a_count() -> None:
    made, memory = tags()
    made.change(Pfn(FIRST + 2), 2, 0xBEEF)
    assert struct.unpack_from("<4Q", memory, 8) == (0, 0x1_BEEF, 0x1_BEEF, 0)
    made.change(Pfn(FIRST + 3), 1, FREE)
    assert struct.unpack_from("<4Q", memory, 8) == (0, 0x1_BEEF, 0x2_0000, 0)
    assert made.read(FIRST + 3) == 0x2_0000


def test_the_same_owner_twice_has_two_tags() -> None:
    made, _ = tags()
    seen = set()
    for _ in range(5):
        made.change(Pfn(FIRST), 1, 1)
        seen.add(made.read(FIRST))
        made.change(Pfn(FIRST), 1, FREE)
        seen.add(made.read(FIRST))
    assert len(seen) == 10


def test_free_is_told_from_owned() -> None:
    made, _ = tags()
    assert is_free(made.read(FIRST))
    made.change(Pfn(FIRST), 1, 1)
    assert not is_free(made.read(FIRST))
    made.change(Pfn(FIRST), 1, FREE)
    assert is_free(made.read(FIRST))


def test_a_reader_needs_no_right_to_write() -> None:
    made, memory = tags()
    reader = FrameTags(BASE, memoryview(memory).toreadonly())
    made.change(Pfn(FIRST + 7), 1, 3)
    assert reader.read(FIRST + 7) == 0x1_0003
    with pytest.raises(TypeError):
        reader.change(Pfn(FIRST), 1, 3)


@pytest.mark.parametrize("owner", [-1, 1 << 16])
def test_an_owner_past_the_limit_is_a_bug(owner: int) -> None:
    made, _ = tags()
    with pytest.raises(AssertionError, match="owner"):
        made.change(Pfn(FIRST), 1, owner)


def test_a_frame_below_the_window_is_a_bug() -> None:
    made, _ = tags()
    with pytest.raises(AssertionError, match="outside of the window"):
        made.change(Pfn(FIRST - 1), 1, 1)


def test_the_tags_of_64_gib_take_128_mib() -> None:
    assert tags_size(64 << 30) == 128 << 20
