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


@pytest.mark.parametrize("cost", [swap_a_file_out])
def test_twice_as_many_pages_take_about_twice_as_long(cost: Callable[[int], int]) -> None:
    assert cost(600) < 2.5 * cost(300)
