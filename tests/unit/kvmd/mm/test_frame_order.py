"""Frames beside an allocator that splits and joins whole blocks: the same frames, in the same order."""

from __future__ import annotations

import random
from collections import deque

import pytest

from kvmd.core.mm.frames import Frames, Reuse
from protocol.errors import UapiError
from protocol.hostmem import HIGH_RAM_START
from protocol.units import GIB, LEVEL_1G, LEVEL_2M, LEVEL_4K, PAGE_SIZE, Level, Pfn, pages_of_level, pfn_of

BLOCKS = 3
CHILDREN = 512
PARENT = {LEVEL_4K: LEVEL_2M, LEVEL_2M: LEVEL_1G}


class Eager:
    """Each free block is in a list of its level, the one to hand out next last."""

    def __init__(self) -> None:
        first = pfn_of(HIGH_RAM_START)
        size = pages_of_level(LEVEL_1G)
        self.free: dict[Level, list[int]] = {LEVEL_4K: [], LEVEL_2M: []}
        self.free[LEVEL_1G] = [first + n * size for n in reversed(range(BLOCKS))]

    def take(self, level: Level) -> int | None:
        if not self.free[level]:
            parent = self.take(PARENT[level]) if level in PARENT else None
            if parent is None:
                return None
            size = pages_of_level(level)
            self.free[level] = [parent + n * size for n in reversed(range(CHILDREN))]
        return self.free[level].pop()

    def put(self, pfn: int, level: Level) -> None:
        self.free[level].append(pfn)
        if level in PARENT:
            size = pages_of_level(PARENT[level])
            parent = pfn & ~(size - 1)
            siblings = [other for other in self.free[level] if parent <= other < parent + size]
            if len(siblings) == CHILDREN:
                self.free[level] = [other for other in self.free[level] if other not in set(siblings)]
                self.put(parent, PARENT[level])


class Counting(dict[Pfn, None]):
    changes = 0

    def __setitem__(self, pfn: Pfn, _: None) -> None:
        Counting.changes += 1
        super().__setitem__(pfn, _)

    def __delitem__(self, pfn: Pfn) -> None:
        Counting.changes += 1
        super().__delitem__(pfn)


def small(reuse: Reuse = Reuse.SOON) -> Frames:
    window = memoryview(bytearray(0)).toreadonly()
    frames = Frames(HIGH_RAM_START, window, lambda offset, size: None, reuse=reuse)
    frames._end = Pfn(pfn_of(HIGH_RAM_START) + BLOCKS * GIB // PAGE_SIZE)
    return frames


@pytest.mark.parametrize("seed", range(6))
def test_the_same_frames_in_the_same_order_as_one_that_splits_eagerly(seed: int) -> None:
    chance, frames, eager = random.Random(seed), small(), Eager()
    taken: list[tuple[int, Level]] = []
    joined = refused = 0
    for _ in range(4000):
        level = chance.choices((LEVEL_4K, LEVEL_2M, LEVEL_1G), (60, 4, 6))[0]
        match chance.choices(("take", "put", "split", "all"), (50, 48, 2, 0.2))[0]:
            case "take":
                expected = eager.take(level)
                if expected is None:
                    refused += 1
                    with pytest.raises(UapiError):
                        frames._take(level)
                    continue
                assert frames._take(level) == expected
                taken.append((expected, level))
            case "put" if taken:
                pfn, level = taken.pop(chance.randrange(len(taken)))
                frames._put(Pfn(pfn), level)
                eager.put(pfn, level)
            case "split" if level == LEVEL_2M and (LEVEL_2M in [of for _, of in taken]):
                pfn, _ = taken.pop(next(n for n, (_, of) in enumerate(taken) if of == LEVEL_2M))
                frames.split(Pfn(pfn), LEVEL_2M)
                taken += [(pfn + n, LEVEL_4K) for n in range(CHILDREN)]
            case "all":
                joined += 1
                for pfn, level in reversed(taken):
                    frames._put(Pfn(pfn), level)
                    eager.put(pfn, level)
                taken.clear()
    assert joined, "nothing was joined"
    assert refused, "nothing was used up"


def test_a_page_given_up_and_taken_again_costs_no_block() -> None:
    """The only page there is: its block is split and joined each time, and its other children not touched."""
    frames = small()
    for level in (LEVEL_4K, LEVEL_2M):
        frames._free[level] = Counting()
    for _ in range(10):
        frames._put(frames._take(LEVEL_4K), LEVEL_4K)
    assert Counting.changes <= 10 * 4


@pytest.mark.parametrize("seed", range(3))
def test_reused_late_no_frame_comes_back_while_there_is_one_that_nobody_had(seed: int) -> None:
    """One frame is never given up: a whole GiB of free ones is a new one to take from."""
    chance, frames = random.Random(seed), small(Reuse.LATE)
    taken: list[Pfn] = []
    seen = {frames._take(LEVEL_4K)}
    for _ in range(4000):
        if taken and chance.random() < 0.5:
            frames._put(taken.pop(chance.randrange(len(taken))), LEVEL_4K)
        else:
            pfn = frames._take(LEVEL_4K)
            assert pfn not in seen
            seen.add(pfn)
            taken.append(pfn)


@pytest.mark.parametrize("seed", range(3))
def test_reused_late_what_was_given_up_longest_ago_comes_first(seed: int) -> None:
    """Beside a queue; one frame is never given up, so that the block is not joined."""
    chance, frames = random.Random(seed), small(Reuse.LATE)
    for _ in range(BLOCKS - 1):
        frames._take(LEVEL_1G)
    for _ in range(CHILDREN - 1):
        frames._take(LEVEL_2M)
    _, *taken = [frames._take(LEVEL_4K) for _ in range(CHILDREN)]
    given_up: deque[Pfn] = deque()
    for _ in range(2000):
        if taken and (not given_up or chance.random() < 0.5):
            pfn = taken.pop(chance.randrange(len(taken)))
            frames._put(pfn, LEVEL_4K)
            given_up.append(pfn)
        else:
            taken.append(frames._take(LEVEL_4K))
            assert taken[-1] == given_up.popleft()


def test_reused_soon_a_frame_comes_back_at_once() -> None:
    frames = small()
    frames._take(LEVEL_4K)
    pfn = frames._take(LEVEL_4K)
    frames._put(pfn, LEVEL_4K)
    assert frames._take(LEVEL_4K) == pfn
