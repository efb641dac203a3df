"""A page of registers in memory that two processes map: loads and stores of one register in one piece.

Models what a bus does for registers [VT-d 11.4]: an aligned access of a register's width is not torn.  Item
access on a `memoryview` cast to 4 or 8 bytes is one mov on x86-64.  Stores stay in order, and so do loads;
only a load may overtake an earlier store: who minds that has a fence between (`protocol/rpc/fence.py`).
Must hold: a mapping is stored to by one process only; the others have it read-only.
"""

from __future__ import annotations

from protocol.hw.vtd_regs import REGISTER_PAGE, WIDE, Register


class RegisterPage:
    """`view` is one page of a mapping, writable or not."""

    __slots__ = ("_words32", "_words64")

    def __init__(self, view: memoryview) -> None:
        assert len(view) == REGISTER_PAGE, f"a register page of {len(view)} bytes"
        self._words32 = view.cast("I")
        self._words64 = view.cast("Q")

    def load(self, register: Register) -> int:
        return self._words64[register >> 3] if register in WIDE else self._words32[register >> 2]

    def store(self, register: Register, value: int) -> None:
        if register in WIDE:
            self._words64[register >> 3] = value
        else:
            self._words32[register >> 2] = value

    def load64(self, offset: int) -> int:
        """8 bytes at an offset: half of a fault recording register."""
        assert offset % 8 == 0, f"unaligned register {offset:#x}"
        return self._words64[offset >> 3]

    def store64(self, offset: int, value: int) -> None:
        assert offset % 8 == 0, f"unaligned register {offset:#x}"
        self._words64[offset >> 3] = value

    def release(self) -> None:
        self._words32.release()
        self._words64.release()
