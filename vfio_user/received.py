"""The fds a client sent, at the process's end: what they are is asked before anything is done with one.

An fd may be anything.  Writing eight bytes to what is no eventfd may block or change a file, so its name in
/proc is looked at; a counter that is full is the client's doing, who is signalled enough.
"""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EINVAL
from typing import Final

from protocol.errors import UapiError
from protocol.kernel.port import BrokenEvent, Kernel, SharedEvent
from vfio_user.core.function import IrqEvent

_EVENTFD: Final = "anon_inode:[eventfd]"


class ClientEvent:
    """The port `IrqEvent`."""

    def __init__(self, event: SharedEvent) -> None:
        self._event = event

    def signal(self) -> None:
        with suppress(BrokenEvent):
            self._event.signal()

    def close(self) -> None:
        self._event.close()


class ReceivedFds:
    """The port `ClientFds`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def close(self, fd: int) -> None:
        self._kernel.close_received(fd)

    def event_of(self, fd: int) -> IrqEvent:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name != _EVENTFD:
            raise UapiError(EINVAL, f"SET_IRQS: a file {name} came, not an eventfd")
        return ClientEvent(self._kernel.event_of(fd))
