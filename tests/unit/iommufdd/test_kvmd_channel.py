"""How iommufdd comes to kvmd: whoever is not let in is told what may stand in the way."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from iommufdd.kvmd_channel import KvmdChannel, nothing
from protocol.errors import UapiError
from protocol.rpc.socket import Listener
from tests.unit.protocol.wires import wires


def test_who_is_hung_up_on_at_the_door_hears_that_there_may_be_no_room(tmp_path: Path) -> None:
    """A kvmd whose fd table is full turns away who connects, and lives."""
    ours, theirs = socket.socketpair()
    with wires() as wire, ours, theirs:
        listener = Listener(wire.loop, tmp_path / "kvmd", lambda sock: sock.close())
        channel = KvmdChannel(wire.loop, tmp_path / "kvmd", nothing)
        asked = wire.loop.flows.start(channel.present("TDP_FD_OPEN", ours.fileno(), "tdp"))
        wire.pump()
        with pytest.raises(UapiError, match="kvmd: it went away, or has no room") as refused:
            asked.result()
        assert refused.value.errno == errno.EOPNOTSUPP
        listener.close()
