"""The registers of a remapping unit as its driver loads and stores them.

Models readl and writel on the register page [VT-d 11.4], with the register in three places so that each word
has one writer (docs/decisions/0018): what a load gives is in the unit's page, what was stored is in ours, and
what the unit took of it is in a third.  A bit that software clears by storing 1 (RW1C) is cleared by flipping
it in our word; the flip counts once, when the unit took it.
Must hold: a bit is flipped only while it shows and its last flip was taken, so no clear is lost or done
twice.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import FAULT_RECORD_F, RW1C, Register


class UnitRegisters:
    """`fence` keeps a load behind it from being made before a store ahead of it; `kick` has the unit look."""

    def __init__(
        self,
        shown: RegisterPage,
        taken: RegisterPage,
        stored: RegisterPage,
        fence: Callable[[], None],
        kick: Callable[[], None],
    ) -> None:
        self.fence = fence
        self.kick = kick
        self._shown = shown
        self._taken = taken
        self._stored = stored

    def load(self, register: Register) -> int:
        return self._shown.load(register)

    def store(self, register: Register, value: int) -> None:
        self._stored.store(register, value)

    def status(self, register: Register) -> int:
        """The RW1C bits that show and were not cleared by us already."""
        flipped = self._taken.load(register) ^ self._stored.load(register)  # first: see docs/decisions/0018
        return self._shown.load(register) & ~flipped & RW1C[register]

    def clear(self, register: Register, bits: int) -> None:
        """Those of `bits`, of `status`, that show; what they stand for is looked at behind this."""
        self._stored.store(register, self._stored.load(register) ^ (self.status(register) & bits))
        self.fence()

    def fault_word(self, offset: int) -> int | None:
        """The half of a fault recording register that has F; None: it does not show, or was cleared."""
        flipped = self._taken.load64(offset) ^ self._stored.load64(offset)
        value = self._shown.load64(offset)
        return value if value & FAULT_RECORD_F & ~flipped else None

    def other_fault_word(self, offset: int) -> int:
        """Its other half."""
        return self._shown.load64(offset)

    def clear_fault(self, offset: int) -> None:
        """The F that `fault_word` showed."""
        self._stored.store64(offset, self._stored.load64(offset) ^ FAULT_RECORD_F)
        self.fence()
