"""The portal's client when the device goes: nobody waits for an interrupt that cannot come."""

from __future__ import annotations

import socket

import pytest
import trio

from protocol.errors import PeerError
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.loop import Loop
from qemu_shim.vmm.device_client import Portal
from tests.patience import PATIENCE_S


@pytest.mark.parametrize("gone_first", [True, False], ids=["gone before the wait", "goes during the wait"])
async def test_a_device_that_goes_ends_every_wait_for_its_interrupt(gone_first: bool) -> None:
    crashes: list[BaseException] = []
    loop = Loop(LINUX, Flows(crashes.append))
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve)
        portal = Portal(loop, ours.detach())

        async def hang_up() -> None:
            theirs.close()
            with pytest.raises(PeerError):
                await portal.mmio_read(0, 8)

        if gone_first:
            await hang_up()
        else:
            nursery.start_soon(hang_up)
        with trio.fail_after(PATIENCE_S), pytest.raises(PeerError, match="the device is gone"):
            await portal.wait_interrupt(1)
        nursery.cancel_scope.cancel()
    loop.close()
    assert crashes == []
