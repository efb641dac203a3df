"""What a change costs grows with what it is about: kvmd does nothing else until it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.reclaim import swap_out
from protocol.units import Hva
from tests.kit.kvmd import RW, World
from tests.kit.steps import steps_of

PAGE = 4096


def swap_a_file_out(pages: int) -> int:
    world = World()
    file = MemoryFile(world.host.memory, "file", pages * PAGE)
    hva = world.run(world.mm.mmap(None, pages * PAGE, RW, shared=True, file=file))
    world.run(world.mm.write(hva, bytes(pages * PAGE)))
    return steps_of(lambda: world.run(swap_out(world.mm, hva, pages * PAGE)))


def truncate_a_file_mapped_page_by_page(pages: int) -> int:
    """The page beside each is not mapped, so that no two are told as one."""
    world = World()
    file = MemoryFile(world.host.memory, "file", 2 * pages * PAGE)
    for page in range(0, 2 * pages, 2):
        at, offset = Hva(0x4000_0000 + page * PAGE), page * PAGE
        world.run(world.mm.mmap(at, PAGE, RW, shared=True, file=file, offset=offset))
        world.run(world.mm.write(at, b"x"))
    assert world.vm.mm is world.mm, "who is told"
    return steps_of(lambda: world.run(file.truncate(0)))


@pytest.mark.parametrize("cost", [swap_a_file_out, truncate_a_file_mapped_page_by_page])
def test_twice_as_many_pages_take_about_twice_as_long(cost: Callable[[int], int]) -> None:
    assert cost(600) < 2.5 * cost(300)
