"""Memory on its way from who lends it to the silicon that walks tables in it: windows, their fds, and the
lease.

What kvmd answered, or what iommufdd lends of its own tables; the core hands it on unseen.  The fds are taken
once, by the message that carries them to the silicon, or closed here.
"""

from __future__ import annotations

from typing import Any

from protocol.rpc.channel import Fds


class LentWindows:
    """The port `LentMemory`.  `windows` as messages carry them; an fd for each, and one that is the lease."""

    def __init__(self, windows: list[Any], fds: Fds) -> None:
        self.windows = windows
        self._fds = fds

    def take_fds(self) -> list[int]:
        """They are the caller's from now on."""
        return [self._fds.take(n) for n in range(len(self._fds))]

    def close(self) -> None:
        self._fds.close()
