"""One remapping unit as processes share it: its pages, the kick, and its three events.

The unit's fds come with the reply to UNIT (docs/decisions/0018): its registers, which we map read-only, and
four eventfds.  Stores of one turn are told by one kick at its end.  Who sends what cannot be, by an event or
in memory, loses the link.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import structlog

from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.unit_registers import UnitRegisters
from protocol.errors import PeerError, UapiError
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import REGISTER_PAGE
from protocol.kernel.port import BrokenEvent, SharedEvent
from protocol.rpc.channel import Fds
from protocol.rpc.fence import full_fence
from protocol.rpc.loop import Loop

log = structlog.get_logger("iommufdd")


class UnitPort:
    """`on_broken` ends the link."""

    def __init__(self, loop: Loop, name: str, on_broken: Callable[[], None]) -> None:
        """Raises OSError."""
        self._loop = loop
        self._name = name
        self._on_broken = on_broken
        self._kick: SharedEvent | None = None
        self._kick_due = False
        self._events: list[SharedEvent] = []
        self._kernel = loop.kernel
        self._store_fd, self._stored = self._kernel.memfd("dmar-stores", REGISTER_PAGE, peer_writes=False)

    def give_store_page(self) -> int:
        """Its fd, which becomes the caller's."""
        fd, self._store_fd = self._store_fd, -1
        return fd

    def take(self, fds: Fds) -> UnitRegisters:
        """The unit's pages and eventfds, as the reply to UNIT carries them.  PeerError: they are not that."""
        try:
            memory = self._kernel.map_peer(fds.peek(0), 2 * REGISTER_PAGE, writable=False).view
            self._kick = self._kernel.event_of(fds.take(1))
            for n in (2, 3, 4):
                self._events.append(self._kernel.event_of(fds.take(n)))
        except (OSError, ValueError, UapiError) as error:
            raise PeerError(f"{self._name}: no registers and events of a unit: {error}") from None
        finally:
            fds.close()  # a mapping has a copy of its own
        shown, taken = RegisterPage(memory[:REGISTER_PAGE]), RegisterPage(memory[REGISTER_PAGE:])
        return UnitRegisters(shown, taken, RegisterPage(self._stored.view), full_fence, self.kick)

    def serve(self, unit: IntelIommu) -> None:
        """From now on its events are heard.  Raises OSError."""
        handlers = (unit.on_fault, unit.on_page_request, unit.on_completion)
        for event, handle in zip(self._events, handlers, strict=True):
            self._loop.register(event.fd, self._heard(event, handle))

    def _heard(self, event: SharedEvent, handle: Callable[[], None]) -> Callable[[int], None]:
        def heard(_: int) -> None:
            try:
                event.drain()  # first: what comes from now on raises it again
                handle()
            except (BrokenEvent, PeerError) as error:
                self._broken(error)

        return heard

    def kick(self) -> None:
        """The unit is to look, at the end of this turn."""
        if not self._kick_due:
            self._kick_due = True
            self._loop.mark_dirty(self)

    def flush(self) -> None:
        self._kick_due = False
        if self._kick is not None:
            try:
                self._kick.signal()
            except BrokenEvent as error:
                self._broken(error)

    def _broken(self, error: Exception) -> None:
        log.error("the remapping unit is not to be trusted: its link ends", unit=self._name, why=str(error))
        self._on_broken()

    def close(self) -> None:
        """Its memory stays mapped as long as somebody looks at it."""
        if self._store_fd != -1:
            self._kernel.close(self._store_fd)
            self._store_fd = -1
        for event in self._events:
            with suppress(KeyError):  # it was not heard yet
                self._loop.unregister(event.fd)
            event.close()
        self._events.clear()
        if self._kick is not None:
            self._kick.close()
            self._kick = None
