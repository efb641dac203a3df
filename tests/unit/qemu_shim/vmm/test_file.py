"""An object's fd at the VMM, when its daemon has hung up."""

from __future__ import annotations

import os
import socket

import pytest

from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import PeerGone
from protocol.rpc.loop import Loop
from qemu_shim.vmm.file import File, copies


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


def test_of_copies_that_cannot_all_be_had_none_is_left() -> None:
    """Nor what was had already: it was to be passed on with them."""
    loop = Loop(LINUX, Flows())
    (here, there), (gone, peer) = socket.socketpair(), socket.socketpair()
    files = [File(loop, here.detach(), "mm"), File(loop, gone.detach(), "memfd")]
    (kept,) = copies(files[:1])
    files[1].close()
    had = os.dup(kept)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerGone, match="memfd hung up"):
        copies(files, had)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    os.close(kept)
    files[0].close()
    for other in (there, peer):
        other.close()
    loop.close()
