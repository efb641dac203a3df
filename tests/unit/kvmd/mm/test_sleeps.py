"""Whoever slept in the host's memory looks again: each sleep with the change that it must notice."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmd.core.mm import space as space_module
from kvmd.core.mm.check import check_memory
from kvmd.core.mm.failure import poison
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.madvise import ADVICE, dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.notifier import MmuNotifier
from kvmd.core.mm.page import Pte
from kvmd.core.mm.reclaim import age, migrate
from kvmd.core.mm.thp import split
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import Wait
from protocol.units import Hva
from tests.kit.kvmd import RW, World

PAGE = 4096
MIB2 = 2 << 20
HUGE_AT = Hva(0x4000_0000)


@dataclass(eq=False)
class Sleeper:
    """A notifier that sleeps through the first change it is told of, and through no other."""

    gate: Wait[None] = field(default_factory=Wait)
    told: list[tuple[int, int]] = field(default_factory=list)

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        self.told.append((start, end))
        if len(self.told) == 1:
            await self.gate

    def invalidate_range_end(self, start: Hva, end: Hva) -> None: ...

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        self.told.append((start, end))
        await self.gate
        return True


@pytest.fixture
def world() -> World:
    return World()


def during(
    world: World, mm: Mm, flow: Coroutine[Any, None, Any], change: Callable[[], Any]
) -> tuple[Wait[Any], Sleeper]:
    """`flow`, which sleeps where it first tells `mm`'s notifiers; `change` happens there."""
    sleeper = Sleeper()
    mm.notifiers.append(sleeper)
    slept = world.start(flow)
    assert len(sleeper.told) == 1, "it sleeps"
    assert not slept.done, "it sleeps"
    change()
    assert not slept.done, "still"
    sleeper.gate.set(None)
    world.flows.run_ready()
    assert slept.done
    return slept, sleeper


def other(world: World) -> Mm:
    return world.host.create_mm()


def shared_file(world: World, *mms: Mm, pages: int = 2) -> tuple[MemoryFile, Hva]:
    """A file whose first byte is F, mapped at one address by all of `mms`."""
    file = MemoryFile(world.host.memory, "f", pages * PAGE)
    world.run(file.pwrite(0, b"F"))
    at = Hva(0x5000_0000)
    for mm in mms:
        world.run(mm.mmap(at, pages * PAGE, RW, shared=True, file=file))
    return file, at


def entry(mm: Mm, hva: Hva) -> Pte:
    found = mm.table.find(hva)
    assert isinstance(found, Pte)
    return found


def huge(world: World) -> Hva:
    world.run(world.mm.mmap(HUGE_AT, MIB2, RW))
    world.run(ADVICE["hugepage"](world.mm, HUGE_AT, MIB2))
    return HUGE_AT


def books_are_right(world: World, *others: Mm) -> None:
    assert check_memory(world.host.memory, [world.mm, *others]) == []


# -- copies --------------------------------------------------------------------------------------------


def shared_since_a_fork(world: World) -> tuple[Mm, Hva]:
    hva = world.map(1)
    world.run(world.mm.write(hva, b"old"))
    child = other(world)
    world.run(fork(world.mm, child))
    return child, hva


def test_a_copy_is_of_the_page_that_is_there_then(world: World) -> None:
    child, hva = shared_since_a_fork(world)

    def moved() -> None:
        before = entry(world.mm, hva).pfn
        assert world.run(migrate(world.mm, hva, PAGE)) == 1
        assert entry(world.mm, hva).pfn != before, "where the copy would have come from is free"

    during(world, world.mm, world.mm.write(Hva(hva + 3), b"new"), moved)
    assert world.run(world.mm.read(hva, 6)) == b"oldnew"
    assert world.run(child.read(hva, 6)) == b"old\0\0\0"
    books_are_right(world, child)


def test_a_copy_for_a_pin_is_of_the_page_that_is_there_then(world: World) -> None:
    child, hva = shared_since_a_fork(world)
    slept, _ = during(
        world,
        world.mm,
        world.mm.fault_to_pin(hva, write=False),
        lambda: world.run(migrate(world.mm, hva, PAGE)),
    )
    found = slept.result()
    assert found is entry(world.mm, hva)
    assert found.page.exclusive
    assert entry(child, hva).page is not found.page
    assert world.run(world.mm.read(hva, 3)) == b"old"
    books_are_right(world, child)


# -- edges ---------------------------------------------------------------------------------------------


def test_a_huge_page_that_comes_up_at_an_edge_is_told_of_as_a_whole(world: World) -> None:
    hva = huge(world)
    flow = dontneed(world.mm, hva, MIB2 // 2)
    _, sleeper = during(world, world.mm, flow, lambda: world.run(world.mm.write(Hva(hva + MIB2 - 1), b"x")))
    assert sleeper.told == [(hva, hva + MIB2 // 2), (hva, hva + MIB2)]
    assert world.run(world.mm.read(Hva(hva + MIB2 - 1), 1)) == b"x"
    assert world.mm.table.find(hva) is None
    books_are_right(world)


def test_a_huge_page_that_is_split_meanwhile(world: World) -> None:
    hva = huge(world)
    world.run(world.mm.write(hva, b"x" * MIB2))
    flow = world.mm.munmap(hva, MIB2 // 2)
    _, sleeper = during(world, world.mm, flow, lambda: world.run(split(world.mm, hva, MIB2)))
    assert sleeper.told[0] == (hva, hva + MIB2)
    assert sleeper.told[-1] == (hva, hva + MIB2 // 2), "told again of what it is now"
    assert world.run(world.mm.read(Hva(hva + MIB2 // 2), 1)) == b"x"
    assert world.host.frames.in_use == 256
    books_are_right(world)


def test_an_entry_that_went_between_two_turns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hva = shared_file(world, world.mm)
    world.run(world.mm.write(Hva(hva + PAGE), b"x"))
    world.run(world.mm.read(hva, 1))
    turn: Wait[None] = Wait()
    monkeypatch.setattr(space_module, "UNMAP_BATCH", 1)
    monkeypatch.setattr(world.host.memory, "cond_resched", lambda: turn)
    slept = world.start(world.mm.munmap(hva, 2 * PAGE))
    assert not slept.done
    assert world.mm.table.find(Hva(hva + PAGE)) is not None
    world.run(file.truncate(0))
    turn.set(None)
    world.flows.run_ready()
    slept.result()
    assert world.host.frames.in_use == 0
    books_are_right(world)


# -- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["punch_hole", "truncate"])
def test_a_mapping_made_while_a_file_loses_a_page_loses_it_too(world: World, how: str) -> None:
    late = other(world)
    file, hva = shared_file(world, world.mm)
    world.run(world.mm.read(hva, 1))

    def map_late() -> None:
        world.run(late.mmap(hva, 2 * PAGE, RW, shared=True, file=file))
        if how == "punch_hole":
            assert world.run(late.read(hva, 1)) == b"F"
        else:
            with pytest.raises(UapiError, match="beyond the end"):
                world.run(late.read(hva, 1))

    flow = file.punch_hole(0, PAGE) if how == "punch_hole" else file.truncate(0)
    during(world, world.mm, flow, map_late)
    assert late.table.find(hva) is None
    assert world.host.frames.in_use == 0
    books_are_right(world, late)


def test_a_mapping_that_went_takes_no_advice(world: World) -> None:
    """The mmap_lock is dropped for the file's: the next mapping is looked up when it is back."""
    file, hva = shared_file(world, world.mm)
    second = MemoryFile(world.host.memory, "g", PAGE)
    behind = Hva(hva + 2 * PAGE)
    world.run(second.pwrite(0, b"G"))
    world.run(world.mm.mmap(behind, PAGE, RW, shared=True, file=second))
    flow = ADVICE["remove"](world.mm, hva, 3 * PAGE)
    world.run(world.mm.read(hva, 1))
    slept, _ = during(world, world.mm, flow, lambda: world.run(world.mm.munmap(behind, PAGE)))
    with pytest.raises(UapiError) as refused:
        slept.result()
    assert refused.value.errno == errno.ENOMEM
    assert (file.pread(0, 1), second.pread(0, 1)) == (b"\0", b"G")


# -- what the host does --------------------------------------------------------------------------------


def test_a_page_that_another_process_came_to_map_is_not_moved(world: World) -> None:
    late = other(world)
    _, hva = shared_file(world, world.mm, late)
    world.run(world.mm.read(hva, 1))
    slept, _ = during(world, world.mm, migrate(world.mm, hva, PAGE), lambda: world.run(late.read(hva, 1)))
    assert slept.result() == 0
    assert entry(late, hva).pfn == entry(world.mm, hva).pfn
    books_are_right(world, late)


def test_memory_that_fails_is_taken_from_who_came_to_map_it(world: World) -> None:
    late = other(world)
    _, hva = shared_file(world, world.mm, late)
    world.run(world.mm.read(hva, 1))
    heard = Sleeper()
    heard.gate.set(None)
    late.notifiers.append(heard)
    during(world, world.mm, poison(world.mm, hva, PAGE), lambda: world.run(late.read(hva, 1)))
    assert heard.told == [(hva, hva + PAGE)], "its MMUs let go before"
    for mm in (world.mm, late):
        with pytest.raises(UapiError) as met:
            world.run(mm.read(hva, 1))
        assert met.value.errno == EHWPOISON
    books_are_right(world, late)


def test_a_huge_page_that_went_is_not_split(world: World) -> None:
    hva = huge(world)
    world.run(world.mm.write(hva, b"x"))
    slept, _ = during(
        world, world.mm, split(world.mm, hva, MIB2), lambda: world.run(world.mm.munmap(hva, MIB2))
    )
    assert slept.result() == 0
    assert world.host.frames.in_use == 0
    books_are_right(world)


def test_a_notifier_that_went_is_not_asked_what_it_used(world: World) -> None:
    hva = world.map(1)
    first, second = Sleeper(), Sleeper()
    users: list[MmuNotifier] = [first, second]
    world.mm.notifiers += users
    slept = world.start(age(world.mm, hva, PAGE))
    assert (len(first.told), len(second.told)) == (1, 0)
    world.mm.notifiers.remove(second)
    first.gate.set(None)
    world.flows.run_ready()
    assert slept.result() == 1
    assert second.told == []
