"""A unit's registers and events as a driver maps them: the pages two processes share, and the eventfds.

The register page and the acknowledge page behind it are ours, and nobody else can store there; the driver's
store page is mapped read-only, and must not be able to shrink.  A kick has the unit look at it.  Events go
out once at the end of a turn, however many were raised in it.  A driver that does with an eventfd what makes
it useless loses its link.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack

from device_sim.core.root_complex import RootComplex
from device_sim.core.unit_registers import Events, RegisterPages
from protocol.errors import UapiError
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import REGISTER_PAGE
from protocol.kernel.asked import refusal
from protocol.kernel.port import BrokenEvent, Mapping
from protocol.rpc.loop import Loop


class TurnEvent:
    """One that goes out at the end of the turn."""

    def __init__(self, loop: Loop, on_broken: Callable[[], None]) -> None:
        """OSError: no room for an eventfd."""
        self.eventfd = loop.kernel.event()
        self._loop = loop
        self._on_broken = on_broken
        self._due = False
        self._closed = False

    def __call__(self) -> None:
        if not self._due and not self._closed:
            self._due = True
            self._loop.mark_dirty(self)

    def flush(self) -> None:
        self._due = False
        if self._closed:
            return
        try:
            self.eventfd.signal()
        except BrokenEvent:
            self._on_broken()

    def close(self) -> None:
        self._closed = True
        self.eventfd.close()


class ConnectedUnit:
    """Unit `number`'s; `on_broken` ends the link.  Of the store page it keeps a mapping only."""

    def __init__(
        self, loop: Loop, silicon: RootComplex, number: int, store_page: int, on_broken: Callable[[], None]
    ) -> None:
        """EINVAL: what the driver gave is no store page; otherwise what the system says."""
        self._loop = loop
        self._on_broken = on_broken
        kernel = self._kernel = loop.kernel
        with ExitStack() as undo:
            try:
                stored = self._view(undo, kernel.map_peer(store_page, REGISTER_PAGE, writable=False))
                self._registers, mapping = kernel.memfd(
                    f"unit {number}", 2 * REGISTER_PAGE, peer_writes=False
                )
                undo.callback(kernel.close, self._registers)
                ours = self._view(undo, mapping)
                events = []
                for _ in range(3):
                    event = TurnEvent(loop, on_broken)
                    undo.callback(event.close)
                    events.append(event)
                self._kick = kernel.event()
                undo.callback(self._kick.close)
                loop.register(self._kick.fd, self._kicked)
                undo.callback(loop.unregister, self._kick.fd)
            except (OSError, ValueError) as error:
                wrong = error.errno if isinstance(error, OSError) else errno.EINVAL
                raise UapiError(wrong or errno.EINVAL, f"registers of unit {number}: {error}") from None
            pages = RegisterPages(
                self._page(undo, ours[:REGISTER_PAGE]),
                self._page(undo, ours[REGISTER_PAGE:]),
                self._page(undo, stored[:REGISTER_PAGE]),
            )
            self._events = events
            self._unit = silicon.connect(number, pages, Events(*events))
            self._undo = undo.pop_all()

    @staticmethod
    def _view(undo: ExitStack, mapping: Mapping) -> memoryview:
        undo.callback(mapping.close)
        return mapping.view

    @staticmethod
    def _page(undo: ExitStack, view: memoryview) -> RegisterPage:
        page = RegisterPage(undo.enter_context(view))
        undo.callback(page.release)
        return page

    def copies(self) -> list[int]:
        """Of the fds that go to the driver, in the order of LinkUnit's reply.  EMFILE."""
        given: list[int] = []
        with ExitStack() as undo:
            try:
                for fd in (self._registers, self._kick.fd, *(event.eventfd.fd for event in self._events)):
                    given.append(self._kernel.dup(fd))
                    undo.callback(self._kernel.close, given[-1])
            except OSError as error:
                raise refusal(error, "no copies of a unit's registers and events") from None
            undo.pop_all()
        return given

    def _kicked(self, _: int) -> None:
        try:
            self._kick.drain()
            if self._unit.kick():
                self._kick.signal()  # it goes on behind whatever else there is for us to hear
        except BrokenEvent:
            self._on_broken()

    def close(self) -> None:
        """When the unit has other registers."""
        self._undo.close()
