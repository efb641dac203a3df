"""What a link to a unit leaves behind when it is gone: nothing, and not when somebody collects garbage."""

from __future__ import annotations

import gc
import os
import select
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from iommufdd.kvm_client import KvmTdp
from iommufdd.service.objects import IommufddApp
from iommufdd.unit_port import UnitPort
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Channel, Fds
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


def test_fds_that_came_with_an_answer_of_kvmd_that_should_have_none_are_closed() -> None:
    """I14."""
    loop = Loop(LINUX, Flows())
    tdp = KvmTdp(loop, Path("kvmd"), 1, -1)
    ours, theirs = LINUX.socketpair()
    read, write = os.pipe()
    tdp._channel = Channel(loop, ours, "tdp")
    kvmd = Channel(loop, theirs, "kvmd", on_request=lambda peer, number, *_: peer.answer(number, {}, [read]))
    unpinned = loop.flows.start(tdp.unpin(1))
    while not unpinned.done:
        loop.turn(0)
        loop.settle()
    unpinned.result()
    assert LINUX.closer.drain(10)
    nobody_reads = select.poll()
    nobody_reads.register(write, 0)
    assert nobody_reads.poll(0) == [(write, select.POLLERR)]
    os.close(write)
    for channel in (tdp._channel, kvmd):
        channel.close()
    loop.close()
