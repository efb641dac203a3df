"""What a VM sees of its process when every lookup of a page may fall asleep, until somebody wakes it.

A lookup sleeps before it looks, as under a userfaultfd, or after it, as a task that is preempted: then what
it brings may be stale, and the caller has to find that out.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage, Pte
from protocol.flow import Wait
from protocol.units import Hva


class SleepyMm:
    """`drowsy` is how likely a lookup falls asleep; `found` is called with what it found, between both."""

    def __init__(self, mm: Mm, random: Random, found: Callable[[MappedPage], None]) -> None:
        self.drowsy = 0.0
        self.slept = 0
        self._mm = mm
        self._random = random
        self._found = found
        self._sleepers: list[Wait[None]] = []

    @property
    def sleepers(self) -> int:
        return len(self._sleepers)

    async def get_user_page(self, hva: Hva, **how: Any) -> MappedPage:
        await self._sleep()
        page = await self._mm.get_user_page(hva, **how)
        self._found(page)
        await self._sleep()
        return page

    async def fault_in(self, hva: Hva, **how: Any) -> Pte:
        await self._sleep()
        entry = await self._mm.fault_in(hva, **how)
        await self._sleep()
        return entry

    async def _sleep(self) -> None:
        if self.drowsy and self._random.random() < self.drowsy:
            self.slept += 1
            self._sleepers.append(Wait())
            await self._sleepers[-1]

    def wake(self, which: int) -> None:
        if self._sleepers:
            self._sleepers.pop(which % len(self._sleepers)).set(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mm, name)
