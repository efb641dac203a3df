"""Loads and stores of shared memory as points, held to a plain memoryview, and what they let others see."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import REGISTER_PAGE
from protocol.pt.mem import TableOutside, TableWriter
from protocol.units import PAGE_SIZE, Hpa
from simulator.kernel.process import SimProcess
from simulator.search.option import Touch
from simulator.world.fate import Fate
from simulator.world.memory import watched
from simulator.world.scheduler import World
from tests.unit.simulator.world.toys import Script, finish, made

Accesses = list[tuple[int, int, bool]]


def view_of(name: str, size: int = 2 * PAGE_SIZE) -> tuple[Any, memoryview, Accesses]:
    """(what is watched, the memory behind it, what was told)."""
    told: Accesses = []
    memory = memoryview(bytearray(size))
    return watched(name, "kvmd", memory, lambda *access: told.append(access), lambda *_: None), memory, told


def test_a_table_is_written_and_read_as_if_nobody_looked() -> None:
    view, memory, told = view_of("tdp-tables")
    table = TableWriter(Hpa(0x10_0000), view)
    table.store64(0x10_0008, 0x77)
    assert table.load64(0x10_0008) == memory.cast("Q")[1] == 0x77
    assert told == [(8, 8, True), (8, 8, False)]
    table.fill_unlinked(Hpa(0x10_1000), list(range(512)))
    assert table.load_table(Hpa(0x10_1000)) == list(range(512)) == memory[PAGE_SIZE:].cast("Q").tolist()
    assert told[2:] == [(PAGE_SIZE, PAGE_SIZE, True), (PAGE_SIZE, PAGE_SIZE, False)]
    with pytest.raises(TableOutside):
        table.load64(0x10_2000)


def test_a_register_page_in_the_middle_of_its_memory_says_where_it_is() -> None:
    view, memory, told = view_of("unit 0", 2 * REGISTER_PAGE)
    page = RegisterPage(view[REGISTER_PAGE:])
    page.store64(16, 5)
    assert memory.cast("Q")[(REGISTER_PAGE + 16) // 8] == 5
    assert told == [(REGISTER_PAGE + 16, 8, True)]
    page.release()


def test_a_slice_of_bytes_is_one_access() -> None:
    view, memory, told = view_of("dmar-queues")
    view[32:64] = bytes(range(32))
    assert bytes(view.toreadonly()[32:64]) == bytes(range(32)) == bytes(memory[32:64])
    assert told == [(32, 32, True), (32, 32, False)]


def test_what_a_device_stores_into_a_frame_goes_in_two_halves() -> None:
    view, memory, _ = view_of("tdp-frames")
    seen: list[bytes] = []
    view._access = lambda *access: seen.append(bytes(memory[:4]))
    assert view[4:8].tobytes() == bytes(4)
    view[0:4] = b"wxyz"
    assert seen == [bytes(4), bytes(4), b"wx\0\0"]
    assert bytes(memory[:4]) == b"wxyz"


def test_what_only_the_model_looks_at_is_noted_and_no_point() -> None:
    """The tags that its own checks go by."""
    told: Accesses = []
    noted: Accesses = []
    view = watched(
        "tdp-frame_tags",
        "kvmd",
        memoryview(bytearray(64)),
        lambda *access: told.append(access),
        lambda *access: noted.append(access),
    )
    view.cast("Q")[3] = 1
    assert (told, noted) == ([], [(24, 8, True)])


def test_a_slice_of_frames_may_be_stored_to_as_late_as_behind_the_next() -> None:
    """`view[a:b] = view[c:d]`: both are sliced, at a point each, before anything is copied."""
    seen: list[str] = []
    view = watched(
        "tdp-frames",
        "kvmd",
        memoryview(bytearray(8)),
        lambda at, size, writes: seen.append(f"point at {at}"),
        lambda at, size, writes: seen.append(f"stores to {at}") if size else None,
    )
    source = view[0:2]
    view[4:6][:] = source
    assert seen == ["point at 0", "stores to 0", "point at 4", "stores to 4", "stores to 0"]


def test_what_is_given_up_is_a_store_of_the_step_that_does_it() -> None:
    strategy = Script()
    world = World(strategy)
    owner, other = SimProcess(world.host, "owner"), SimProcess(world.host, "other")
    fd, ours = owner.memfd("tdp-frames", 2 * PAGE_SIZE, peer_writes=True)
    other.map_peer(other.install(owner.file(fd)), 2 * PAGE_SIZE, writable=True)
    world.spawn(owner, lambda: ours.discard(PAGE_SIZE, PAGE_SIZE))
    world.spawn(other, lambda: None)
    finish(world)
    halves = {Touch(("word", "owner.tdp-frames1", number), True) for number in (2, 3)}
    assert any(halves <= step.touches for step in strategy.taken)


def two_words(world: World, seen: list[tuple[int, int]]) -> None:
    """One process stores 1 and then 1 side by side, another loads the first and then the second."""
    writer, reader = SimProcess(world.host, "writer"), SimProcess(world.host, "reader")
    fd, ours = writer.memfd("tdp-tables", PAGE_SIZE, peer_writes=False)
    file = writer.file(fd)
    theirs = reader.map_peer(reader.install(file), PAGE_SIZE, writable=False)

    def store(_: SimProcess) -> None:
        words = ours.view.cast("Q")
        words[0] = 1
        words[1] = 1

    def load(_: SimProcess) -> None:
        words = theirs.view.cast("Q")
        seen.append((words[0], words[1]))

    world.spawn(writer, lambda: store(writer))
    world.spawn(reader, lambda: load(reader))
    finish(world)


@pytest.mark.parametrize(
    ("script", "sees"),
    [
        (("writer: begins",), (1, 1)),
        (("reader: begins", "reader: loads writer.tdp-tables1[0]", "reader: loads"), (0, 0)),
        (("reader: begins", "reader: loads", "writer: begins", "writer: stores", "writer: stores"), (0, 1)),
        (("writer: begins", "writer: stores", "reader: begins", "reader: loads", "reader: loads"), (1, 0)),
    ],
)
def test_a_reader_can_come_between_any_two_stores(script: tuple[str, ...], sees: tuple[int, int]) -> None:
    seen: list[tuple[int, int]] = []
    strategy = Script(*script)
    two_words(World(strategy), seen)
    assert seen == [sees]
    word = Touch(("word", "writer.tdp-tables1", 0), True)
    assert any(word in step.touches for step in strategy.taken), "who searches is told which word"


@pytest.mark.parametrize("stores", [0, 1, 2])
def test_who_dies_may_die_between_two_stores_though_nobody_else_has_a_step(stores: int) -> None:
    world = World(Script())
    writer, idle = SimProcess(world.host, "writer"), SimProcess(world.host, "idle")
    fd, ours = writer.memfd("tdp-tables", PAGE_SIZE, peer_writes=False)
    theirs = idle.map_peer(idle.install(writer.file(fd)), PAGE_SIZE, writable=False)

    def store() -> None:
        words = ours.view.cast("Q")
        words[0] = 1
        words[1] = 1

    world.run(world.spawn(writer, store, Fate(2 + stores)))
    assert list(theirs.view.cast("Q")[:2]) == [int(stores > 0), int(stores > 1)]
    world.close()


def test_without_points_at_words_there_are_none() -> None:
    seen: list[tuple[int, int]] = []
    strategy = Script()
    world = World(strategy, by_word=False)
    two_words(world, seen)
    assert not any("loads" in step.label for step in strategy.taken)


def test_memory_of_one_process_is_no_point() -> None:
    strategy = Script()
    world = World(strategy)

    def alone(process: SimProcess) -> None:
        _, mapping = process.memfd("tdp-tables", PAGE_SIZE, peer_writes=False)
        mapping.view.cast("Q")[0] = 1

    made(world, a=alone, b=alone)
    finish(world)
    assert {step.label for step in strategy.taken} == {"begins"}


@pytest.mark.parametrize("name", ["tdp-tables", "tdp-frames", "tdp-frame_tags", "kvm-run"])
def test_what_somebody_still_looks_at_is_not_unmapped(name: str) -> None:
    """Whatever it is watched by, as without."""
    _, mapping = SimProcess(World(Script()).host, "owner").memfd(name, PAGE_SIZE, peer_writes=True)
    parts: list[Any] = [mapping.view[:16]]
    if name != "tdp-frames":
        parts += [mapping.view.cast("Q"), mapping.view[8:].cast("Q")]
    while parts:
        with pytest.raises(BufferError):
            mapping.close()
        parts.pop().release()
    mapping.close()
