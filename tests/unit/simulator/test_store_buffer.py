"""Stores that wait in a buffer: what others miss, what their owner sees, and what lets them go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from protocol.rpc.fence import full_fence
from simulator.faults.plan import VICTIMS, Faults
from simulator.faults.seams import injected
from simulator.faults.store_buffer import BUFFER_STORES, StoreBuffer, Word
from simulator.kernel.files import Memory
from simulator.kernel.process import SimProcess
from simulator.search.option import Option
from simulator.world.scheduler import World
from tests.integration.simulator.drawn import Drawn

MINE, THEIRS = 0, 1  # words
SCHEDULES = 40
Play = Callable[[], None]


def nothing() -> None: ...


class Even(Drawn):
    """Whoever is next, by an even coin."""

    def choose(self, options: Sequence[Option]) -> int:
        assert self._random is not None
        return self._random.randrange(len(options))


def played(seed: int, fence: Play, owner: str = "kvmd") -> tuple[list[int], StoreBuffer]:
    """Two processes store a word each and then look at the other's: what each saw, and the buffer of one."""
    world, faults = World(Even(seed)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd, iommufdd = (SimProcess(world.host, name) for name in VICTIMS[:2])
    saw: list[int] = []

    def side(process: SimProcess, fd: int, mine: int, theirs: int) -> Play:
        def body() -> None:
            words = process.map_peer(fd, 4096, writable=True).view.cast("Q")
            process.event().signal()  # both have it mapped
            words[mine] = 1
            assert words[mine] == 1, "who stored it sees it"
            fence()
            saw.append(words[theirs])
            process.event().signal()

        return body

    fd, _ = kvmd.memfd("unit 0", 4096, peer_writes=True)
    file = kvmd.file(fd)
    other = iommufdd.install(file)
    with injected(faults):
        buffer = faults.buffer = StoreBuffer(owner)
        faults._buffers = True
        threads = [
            world.spawn(kvmd, side(kvmd, fd, MINE, THEIRS)),
            world.spawn(iommufdd, side(iommufdd, other, THEIRS, MINE)),
        ]
        for thread in threads:
            world.run(thread)
    assert isinstance(file, Memory)
    assert world.failures == []
    assert list(memoryview(file.bytes)[:16].cast("Q")) == [1, 1], "behind a system call all is there"
    return saw, buffer


def test_without_a_fence_both_look_too_early_and_it_is_said() -> None:
    seen = [played(seed, nothing) for seed in range(SCHEDULES)]
    early = [buffer.missed for saw, buffer in seen if saw == [0, 0]]
    assert early
    assert all(
        "iommufdd looked at kvmd.unit 01[0] before kvmd's store to it was there" in why for why in early
    )


@pytest.mark.parametrize("owner", VICTIMS[:2])
def test_with_a_full_fence_one_of_them_sees_the_other(owner: str) -> None:
    assert all(sum(played(seed, full_fence, owner)[0]) > 0 for seed in range(SCHEDULES))


def test_it_lets_go_in_order_when_it_is_full_and_when_it_is_drained() -> None:
    memory, made, buffer = Memory(1, 4096, sealed=True), list[int](), StoreBuffer("kvmd")
    words = [Word(memory, 8 * n, 8) for n in range(BUFFER_STORES + 1)]
    for n, word in enumerate(words):
        buffer.store(word, n, lambda n=n: made.append(n), nothing)  # type: ignore[misc]
    assert made == [0]
    assert buffer.forwarded(words[5]) == 5
    assert buffer.forwarded(words[0]) is None
    assert made == [0]
    assert buffer.forwarded(Word(memory, 8, 4)) is None, "half of a word is not forwarded"
    assert made == list(range(BUFFER_STORES + 1))


def test_the_last_store_to_a_word_is_what_its_owner_loads() -> None:
    memory, buffer = Memory(1, 4096, sealed=True), StoreBuffer("kvmd")
    word = Word(memory, 8, 8)
    for value in (Random(1).randrange(100), 7):
        buffer.store(word, value, nothing, nothing)
    assert buffer.forwarded(word) == 7


def test_a_store_that_retired_is_made_though_its_process_dies() -> None:
    world, faults = World(Drawn(None)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd = SimProcess(world.host, "kvmd")
    fd, mapping = kvmd.memfd("unit 0", 4096, peer_writes=False)
    file = kvmd.file(fd)
    assert isinstance(file, Memory)

    def body() -> None:
        mapping.view.cast("Q")[0] = 5
        assert file.bytes[0] == 0
        raise KeyboardInterrupt

    with injected(faults):
        faults.buffer, faults._buffers = StoreBuffer("kvmd"), True
        world.run(world.spawn(kvmd, body))
    assert file.bytes[0] == 5
