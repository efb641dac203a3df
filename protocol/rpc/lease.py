"""A lease: who lends memory learns when nobody holds any of it any more.

One end of a socket pair goes with what is lent, and is copied with it; Linux says when the last copy is
closed, by whoever holds it or by its death (docs/decisions/0007).
"""

from __future__ import annotations

import socket
from contextlib import ExitStack

from protocol.flow import Wait
from protocol.kernel.asked import refusal
from protocol.rpc.loop import Loop


class LeaseSocket:
    """One end is ours; `ended` is set when every copy of the other is closed."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.ended: Wait[None] = Wait()
        with ExitStack() as undo:
            try:
                self._ours, theirs = loop.kernel.socketpair()
                undo.callback(self._ours.close)
                undo.callback(theirs.close)
                self._ours.shutdown(socket.SHUT_RD)  # nobody has a reason to write here, least of all fds
                loop.register(self._ours.fileno(), self._on_hang_up, 0)
            except OSError as error:
                raise refusal(error, "no file for a new lease") from None
            undo.pop_all()
        self.theirs = theirs.detach()

    def _on_hang_up(self, _: int) -> None:
        self.close()

    def close(self) -> None:
        if not self.ended.done:
            self._loop.unregister(self._ours.fileno())
            self._ours.close()
            self.ended.set(None)

    def withdraw(self) -> None:
        """Nobody was given it after all."""
        self._loop.kernel.close(self.theirs)
        self.close()
