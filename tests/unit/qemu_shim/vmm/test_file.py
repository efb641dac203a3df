"""An object's fd at the VMM, when its daemon has hung up."""

from __future__ import annotations

import os
import socket

import pytest

from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import PeerGone
from protocol.rpc.loop import Loop
from qemu_shim.vmm.file import File


def test_the_number_of_a_file_that_is_gone_is_not_passed_on() -> None:
    """Somebody else's file has it by now."""
    loop = Loop(LINUX, Flows())
    ours, theirs = socket.socketpair()
    file = File(loop, ours.detach(), "mm")
    theirs.close()
    loop.turn(0)
    assert file.closed
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == file.number
    with pytest.raises(PeerGone, match="mm hung up"):
        file.dup()
    os.close(other)
    loop.close()
