"""The processes whose memory one iommufd's IOASes map, each at the host once.

Models what struct iopt_pages has of one, source_mm [iommufd pages.c]: pins are made with it and charged to
it, whoever asks.  Without pages of it, it is kept for the IOASes that mapped some until another process is
asked for or takes over, so that who maps and unmaps is not connected anew each time.
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
    """`bus`: of the units that were given the windows its frames lie in.  `spaces`: IOASes that mapped some
    of it.  `pages`: what is mapped of it, and whether each is memory of the process itself, which nobody else
    can take over.
    """

    def __init__(self, host: ProcessMemory, bus: MemoryBus, windows: int) -> None:
        self.host = host
        self.bus = bus
        self.spaces: dict[object, None] = {}
        self.pages: dict[object, bool] = {}
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

    async def get(self, mm: CallerMm, on_invalidate: Invalidate, space: object) -> Source:
        """That of `mm`, for the IOAS `space`; a new one if the units of the last are gone, or its host is.
        With the lock held; errors as of `Connect`.
        """
        of_mm = (source for source, name in self._mms.items() if name == mm.cookie)
        source = next((source for source in of_mm if source.is_there), None)
        if source is None:
            # await: on_invalidate, space: cannot change: the caller's own
            await self._let_go_of_idle()
            # await: space: cannot change: the same
            source = await self._connect(mm, on_invalidate)
            self._mms[source] = mm.cookie
        source.spaces[space] = None
        return source

    def of(self, space: object) -> list[Source]:
        """Whose memory that IOAS maps, or has mapped; in the order they came."""
        return [source for source in self._mms if space in source.spaces]

    async def put(self, source: Source, pages: object) -> None:
        """They are not mapped any more."""
        # await: source, pages: cannot change: the caller's own, which are of it until now
        async with self.lock:
            del source.pages[pages]
            if not source.pages and not source.spaces:
                await self._let_go([source])

    async def leave(self, space: object) -> None:
        """That IOAS is gone."""
        # await: space: cannot change: the caller's own
        async with self.lock:
            left = self.of(space)
            for source in left:
                del source.spaces[space]
            await self._let_go([source for source in left if not source.pages and not source.spaces])

    async def _let_go_of_idle(self) -> None:
        await self._let_go([source for source in self._mms if not source.pages])

    async def _let_go(self, sources: list[Source]) -> None:
        """With the lock held."""
        for source in sources:
            del self._mms[source]
            # await: each source: cannot change: our own list, and nobody else finds it any more
            await source.let_go()

    async def change_process(self, mm: CallerMm) -> None:
        """All is paid for by that process from now on [iommufd_ioas_change_process].  EINVAL: some of it is
        memory of a process itself; ENOMEM: RLIMIT_MEMLOCK, and nothing has changed.
        """
        async with self.lock:
            if any(any(source.pages.values()) for source in self._mms):
                raise UapiError(errno.EINVAL, "memory of a process is mapped: files alone can be taken over")
            # await: asked, source: cannot change: the lock is held
            await self._let_go_of_idle()
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
