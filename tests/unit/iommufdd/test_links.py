"""What a link to a unit leaves behind when it is gone: nothing, and not when somebody collects garbage."""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace
from typing import cast

import pytest

from iommufdd.service.objects import IommufddApp
from iommufdd.unit_port import UnitPort
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Fds
from protocol.rpc.loop import Loop
from protocol.units import PAGE_SIZE


def test_the_memory_that_a_unit_s_registers_came_with_is_mapped_and_its_fd_closed() -> None:
    loop = Loop(LINUX, Flows())
    port = UnitPort(loop, "unit 0", lambda: None)
    registers, mapping = LINUX.memfd("registers", 2 * PAGE_SIZE, peer_writes=False)
    events = [os.eventfd(0) for _ in range(4)]
    port.take(Fds(LINUX, [registers, *events]))
    assert LINUX.closer.drain(10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(registers)
    assert [os.fstat(fd).st_size for fd in events] == [0] * 4, "the events are the link's"
    port.close()
    assert LINUX.closer.drain(10)
    mapping.close()
    loop.close()


def test_what_knows_itself_in_circles_goes_with_the_next_link() -> None:
    class Former:
        def __init__(self) -> None:
            self.me = self

    loop = Loop(LINUX, Flows())
    was = gc.isenabled()
    gc.disable()
    try:
        former = weakref.ref(Former())
        forgetting = loop.flows.start(
            IommufddApp._forget_former(cast(IommufddApp, SimpleNamespace(loop=loop)))
        )
        assert former() is not None
        while not forgetting.done:
            loop.turn(0)
        assert former() is None
    finally:
        if was:
            gc.enable()
        loop.close()
