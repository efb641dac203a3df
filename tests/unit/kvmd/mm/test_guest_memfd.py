"""A file no process can map: its pages, and that a hole waits for those who use it."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.mm.guest_memfd import GuestMemfd
from protocol.errors import UapiError
from protocol.flow import Wait
from tests.unit.kvmd.world import World

PAGE = 4096


class SlowBinding:
    def __init__(self) -> None:
        self.gate: Wait[None] = Wait()
        self.log: list[tuple[str, int, int]] = []

    async def gmem_invalidate_start(self, file: GuestMemfd, first: int, last: int) -> None:
        self.log.append(("start", first, last))
        await self.gate

    def gmem_invalidate_end(self, file: GuestMemfd, first: int, last: int) -> None:
        self.log.append(("end", first, last))


def test_pages_are_made_once_and_freed_with_the_file() -> None:
    world = World()
    file = GuestMemfd(world.host.memory, 4 * PAGE)
    assert file.present_page(1) is None
    assert file.get_page(1) is file.get_page(1) is file.present_page(1)
    with pytest.raises(UapiError) as caught:
        file.get_page(4)
    assert caught.value.errno == errno.EFAULT
    world.run(file.release())
    assert world.host.frames.in_use == 0


def test_a_hole_waits_until_its_bindings_have_let_go() -> None:
    world = World()
    file, binding = GuestMemfd(world.host.memory, 4 * PAGE), SlowBinding()
    file.bindings.append(binding)
    pages = [file.get_page(i) for i in range(4)]
    over = world.start(file.punch_hole(PAGE, 2 * PAGE))
    assert (over.done, world.host.frames.in_use) == (False, 4)
    binding.gate.set(None)
    world.flows.run_ready()
    assert (over.done, world.host.frames.in_use) == (True, 2)
    assert binding.log == [("start", 1, 3), ("end", 1, 3)]
    assert file.get_page(0) is pages[0]
    assert file.get_page(1) is not pages[1]


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_a_size_that_is_not_whole_pages_is_einval(size: int) -> None:
    with pytest.raises(UapiError) as caught:
        GuestMemfd(World().host.memory, size)
    assert caught.value.errno == errno.EINVAL
