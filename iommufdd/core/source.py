"""The processes whose memory one iommufd's IOASes map, each at the host once.

Models what struct iopt_pages has of one, source_mm [iommufd pages.c]: pins are made with it and charged to
it, whoever asks.  It is let go of when no IOAS that mapped something of it is left, and no pages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import count
from typing import Any

from iommufdd.core.hardware import MemoryBus
from iommufdd.core.hmm import CallerMm, Invalidate, ProcessMemory
from protocol.errors import UapiError
from protocol.flow import RwLock


class Source:
    """`bus`: of the units that were given the windows its frames lie in.  `users`: IOASes and pages, and
    whether each is memory of the process itself, which nobody else can take over.
    """

    def __init__(self, host: ProcessMemory, bus: MemoryBus, windows: int) -> None:
        self.host = host
        self.bus = bus
        self.users: dict[object, bool] = {}
        self._windows = windows
        self._numbers = count(1)

    @property
    def lent(self) -> bool:
        """Have the units its windows?"""
        return self._windows != 0

    @property
    def is_there(self) -> bool:
        """May more be mapped of it?"""
        return self.bus.alive and self.lent and not self.host.is_gone

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


Connect = Callable[[CallerMm, Invalidate], Coroutine[Any, Any, Source]]


class Sources:
    """By the name of the process.  `lock` is held by whoever adds pages or changes who pays for them."""

    def __init__(self, connect: Connect) -> None:
        self.lock = RwLock()
        self._connect = connect
        self._mms: dict[Source, int] = {}

    async def get(self, mm: CallerMm, on_invalidate: Invalidate, user: object) -> Source:
        """That of `mm`, for `user`; a new one if the units of the last are gone, or its host is.  With the
        lock held; errors as of `Connect`.
        """
        of_mm = (source for source, name in self._mms.items() if name == mm.cookie)
        source = next((source for source in of_mm if source.is_there), None)
        if source is None:
            # await: user: cannot change: the caller's own
            source = await self._connect(mm, on_invalidate)
            self._mms[source] = mm.cookie
        source.users.setdefault(user, False)
        return source

    async def put(self, source: Source, user: object) -> None:
        # await: source, user: cannot change: the caller's own, which is a user of it until now
        async with self.lock:
            del source.users[user]
            if not source.users:
                del self._mms[source]
                await source.let_go()

    async def change_process(self, mm: CallerMm) -> None:
        """All is paid for by that process from now on [iommufd_ioas_change_process].  EINVAL: some of it is
        memory of a process itself; ENOMEM: RLIMIT_MEMLOCK, and nothing has changed.
        """
        async with self.lock:
            if any(any(source.users.values()) for source in self._mms):
                raise UapiError(errno.EINVAL, "memory of a process is mapped: files alone can be taken over")
            changed: list[Source] = []
            try:
                for source in [source for source, name in self._mms.items() if name != mm.cookie]:
                    # await: each source, source, changed, asked: cannot change: the lock is held
                    await source.host.change_process(mm.fd)
                    changed.append(source)
            except UapiError:
                for source in changed:
                    # await: each source, asked: cannot change: our own list, and the lock
                    await source.host.undo_change_process()
                raise
            self._mms.update(dict.fromkeys(changed, mm.cookie))
