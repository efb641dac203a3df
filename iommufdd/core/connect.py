"""To the memory of a process at the host: how an IOAS comes by it, and what must be there before it is used.

Models the way from current->mm to pinned pages [iommufd pages.c] and to a registered mmu_interval_notifier
[mm hmm.c].  First there are units that could reach it; then kvmd is asked for the process, and registered
with, which lends the windows its frames lie in; last the units get those.  What fails leaves no mirror
behind.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from iommufdd.core.hardware import Hardware, LentMemory
from iommufdd.core.hmm import CallerMm, Invalidate, ProcessMemory
from iommufdd.core.source import Source
from protocol.errors import UapiError


class ProcessMirror(ProcessMemory, Protocol):
    """One that is not there yet."""

    async def open(self) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: no process's fd; EMFILE."""

    async def register(self, account: str) -> LentMemory:
        """Pins count against the limit of `account`; the windows that its pages lie in."""


MirrorOf = Callable[[CallerMm, Invalidate, Callable[[], None]], ProcessMirror]


class Connector:
    """For the IOASes of one iommufd.  `account`: whose limit pins count against, "user" or "mm"
    (RLIMIT_MODE).

    `live` finds units; `mirror_of` makes the port to a process, which calls the two functions it is given for
    every invalidation, and if the host goes first; `lost` hears of the latter.
    """

    def __init__(
        self,
        live: Callable[[], Coroutine[Any, Any, Hardware]],
        mirror_of: MirrorOf,
        lost: Callable[[ProcessMemory], None],
    ) -> None:
        self.account = "user"
        self._live = live
        self._mirror_of = mirror_of
        self._lost = lost

    # awaits: on_invalidate: cannot change: the caller's own | hardware: it may go; asked again: `add_memory`
    # (tests/unit/iommufdd/test_connect.py::test_units_that_go_meanwhile_leave_no_mirror) | host: it may go;
    # asked again: `is_gone`, behind the last
    # (tests/unit/iommufdd/test_connect.py::test_a_host_that_goes_while_units_get_its_windows_leaves_none)
    async def __call__(self, mm: CallerMm, on_invalidate: Invalidate) -> Source:
        """Raises UapiError: EOPNOTSUPP: no KVM; ENODEV: no units; EINVAL: no process's fd; EMFILE, ENOMEM."""
        hardware = await self._live()
        host = self._mirror_of(mm, on_invalidate, lambda: self._lost(host))
        try:
            await host.open()
            source = Source(host, hardware, await hardware.add_memory(await host.register(self.account)))
            if host.is_gone:  # nobody used it when that was told, so nobody else takes its windows back (R28)
                await source.lose_windows()
                raise UapiError(errno.ENODEV, "KVM went away")
            return source
        except UapiError:
            host.release()
            raise
