"""The registers of a remapping unit: what software is shown, what it stored, and what was taken of that.

Models [VT-d 11.4] over memory that two processes share, each word stored to by one of them
(docs/decisions/0018): what a load gives is in our page, what software stored is in its page, and beside ours
lies what we took.  A status bit (RW1C) is cleared by software flipping it in its word: what differs from what
we took is cleared, and only then shown as taken, so that no clear is lost or done twice.

An event goes out when a bit of its status register comes to be set; IM of its control register holds it back
as IP.  Software clears a bit and then looks at what it stands for; we store what it stands for, then take
clears, with a fence between: one of the two sees the other's store, so no event is missed.

What software stored is read once and bounded by who uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from protocol.hw.caps import Cap, Ecap
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import FAULT_RECORD_F, REGISTER_PAGE, RW1C, EventControl, Fsts, Reg, Register

ARCHITECTURE_VERSION: Final = 0x10  # 1.0


def _nothing() -> None:
    """Nobody listens."""


class Events(NamedTuple):
    """How software is interrupted."""

    fault: Callable[[], None] = _nothing
    page_request: Callable[[], None] = _nothing
    completion: Callable[[], None] = _nothing


class RegisterPages(NamedTuple):
    """Ours to store into: what is `shown`, what was `taken`; and what software `stored`."""

    shown: RegisterPage
    taken: RegisterPage
    stored: RegisterPage

    @classmethod
    def private(cls) -> RegisterPages:
        """Of a unit that has no driver."""
        return cls(*(RegisterPage(memoryview(bytearray(REGISTER_PAGE))) for _ in range(3)))


# Whose event a status register's bits raise, and its control register.
_CONTROL: Final = {Reg.FSTS: Reg.FECTL, Reg.PRS: Reg.PECTL, Reg.ICS: Reg.IECTL}
_REPORTED: Final = {**RW1C, Reg.FSTS: RW1C[Reg.FSTS] | Fsts.PPF}


class RegisterSet:
    """`fence` keeps a load behind it from being made before a store ahead of it."""

    def __init__(self, cap: Cap, ecap: Ecap, fence: Callable[[], None] = _nothing) -> None:
        self._capabilities = {Reg.VER: ARCHITECTURE_VERSION, Reg.CAP: cap.value, Reg.ECAP: ecap.value}
        self._fence = fence
        self.connect(RegisterPages.private(), Events())

    def connect(self, pages: RegisterPages, events: Events) -> None:
        """As after a reset, in these pages."""
        self._shown, self._taken, self._stored = pages
        # Each kick looks at ten registers: these are the pages' own functions.
        self.stored: Callable[[Register], int] = pages.stored.load
        """What software stored there last: its word, so read it once."""
        self.shown: Callable[[Register], int] = pages.shown.load
        self.show: Callable[[Register, int], None] = pages.shown.store
        self._events = {Reg.FSTS: events.fault, Reg.PRS: events.page_request, Reg.ICS: events.completion}
        for register, value in self._capabilities.items():
            self._shown.store(register, value)
        for control in _CONTROL.values():
            self._shown.store(control, EventControl.IM)

    # -- status bits and their events ------------------------------------------------------------------

    def take_clears(self, status: Register) -> int:
        """What software cleared since the last time, of its RW1C bits; they do not show any more."""
        now = self._stored.load(status)
        cleared = (now ^ self._taken.load(status)) & RW1C[status]
        if cleared:
            self._shown.store(status, self._shown.load(status) & ~cleared)
            self._taken.store(status, now)
            self._service(status)
        return cleared

    def _service(self, status: Register) -> None:
        """With nothing left to report an event that is held back is no more [VT-d 11.4]."""
        control = _CONTROL[status]
        if not self._shown.load(status) & _REPORTED[status]:
            self._shown.store(control, self._shown.load(control) & ~EventControl.IP)

    def raise_status(self, status: Register, bits: int) -> None:
        """What the bits stand for is stored: they show, and the event goes out if they did not."""
        self._fence()
        self.take_clears(status)
        before = self._shown.load(status)
        if before | bits != before:
            self._shown.store(status, before | bits)
            self.send_event(status)

    def lower_status(self, status: Register, bits: int) -> None:
        """What the bits stand for is no more, and they do not show any more."""
        self._shown.store(status, self._shown.load(status) & ~bits)
        self._service(status)

    def send_event(self, status: Register) -> None:
        control = _CONTROL[status]
        if self._shown.load(control) & EventControl.IM:
            self._shown.store(control, self._shown.load(control) | EventControl.IP)
        else:
            self._events[status]()

    def latch_controls(self) -> None:
        """IM as software stored it; what it held back goes out when it is clear."""
        for status, control in _CONTROL.items():
            masked = self._stored.load(control) & EventControl.IM
            shown = self._shown.load(control)
            if masked == shown & EventControl.IM:
                continue
            self._shown.store(control, masked)
            if shown & EventControl.IP:
                self._events[status]()

    # -- fault recording registers ---------------------------------------------------------------------

    def show_fault(self, offset: int, low: int, high: int) -> None:
        """The half with F last."""
        self._shown.store64(offset, low)
        self._shown.store64(offset + 8, high)

    def has_fault(self, offset: int) -> bool:
        """Does F show there, and was not cleared meanwhile?"""
        at = offset + 8
        now = self._stored.load64(at)
        shown = self._shown.load64(at)
        if (now ^ self._taken.load64(at)) & FAULT_RECORD_F:
            shown &= ~FAULT_RECORD_F
            self._shown.store64(at, shown)
            self._taken.store64(at, now & FAULT_RECORD_F)
        return bool(shown & FAULT_RECORD_F)
