"""The processes whose memory one iommufd's IOASes map, each at the host once.

Models what struct iopt_pages has of one, source_mm [iommufd pages.c]: pins are made with it and charged to
it, whoever asks.  It is let go of when no IOAS that mapped something of it is left, and no pages.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import count
from typing import Any

from iommufdd.core.hardware import Memory
from iommufdd.core.hmm import HostMemory
from protocol.errors import UapiError
from protocol.flow import RwLock


class Source:
    """`bus`: of the units that were given the windows its frames lie in; `users`: IOASes and pages."""

    def __init__(self, host: HostMemory, bus: Memory, windows: int) -> None:
        self.host = host
        self.bus = bus
        self.users: set[object] = set()
        self._windows = windows
        self._numbers = count(1)

    @property
    def lent(self) -> bool:
        """Have the units its windows?"""
        return self._windows != 0

    def new_number(self) -> int:
        """Whose pins they are, as the host is told."""
        return next(self._numbers)

    async def lose_windows(self) -> None:
        """Nobody reaches its frames any more."""
        windows, self._windows = self._windows, 0
        if windows:
            with suppress(UapiError):  # the silicon is gone, and every lease with it
                await self.bus.remove_memory(windows)

    async def let_go(self) -> None:
        """Nobody needs it: its pins end, behind the units."""
        await self.lose_windows()
        self.host.release()


Connect = Callable[[], Coroutine[Any, None, Source]]  # to the caller's process


class Sources:
    """By the name of the process.  `lock` is held by whoever adds pages or changes who pays for them."""

    def __init__(self) -> None:
        self.lock = RwLock()
        self._by_mm: dict[int, Source] = {}

    async def get(self, mm: int, connect: Connect, user: object) -> Source:
        """That of `mm`, for `user`; a new one if the units of the last are gone.  With the lock held; errors
        as of `connect`.
        """
        source = self._by_mm.get(mm)
        if source is None or not source.bus.alive:
            # await: user: cannot change: the caller's own
            source = self._by_mm[mm] = await connect()
        source.users.add(user)
        return source

    async def put(self, source: Source, user: object) -> None:
        source.users.discard(user)
        if not source.users:
            self._by_mm = {mm: other for mm, other in self._by_mm.items() if other is not source}
            await source.let_go()
