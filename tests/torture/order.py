"""What is to befall a process, and at which of its calls: a page of a file that it and the driver share.

The driver stores, the process counts.  So one process can be struck again and again, at another call each
time, without being started anew.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from tests.torture.calls import AT, CALLS, ERRNOS, Fault

_NUMBER: Final = {name: number for number, name in enumerate(CALLS, 1)}


class Order:
    """`at` counts from 1, among the calls at which the fault can befall anybody."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._words = memoryview(mapping).cast("Q")

    # -- the driver's side -----------------------------------------------------------------------------

    def give(self, fault: Fault, at: int, errno_index: int = 0) -> None:
        """`errno_index`: which of its errnos the call fails with."""
        self.withdraw()
        words = self._words
        words[1], words[2], words[3], words[4], words[5] = at, errno_index, 0, 0, 0
        words[0] = fault

    def withdraw(self) -> None:
        self._words[0] = Fault.NOTHING

    @property
    def met(self) -> str | None:
        """The call it befell; None: it made fewer calls."""
        number = self._words[4]
        return CALLS[number - 1] if number else None

    @property
    def done(self) -> bool:
        """Nothing more will befall it: it never got there, or has it behind it."""
        return not self._words[4] or bool(self._words[5])

    # -- the process's side ----------------------------------------------------------------------------

    def at_call(self, name: str) -> Fault:
        """Asked before each call."""
        words = self._words
        fault = words[0]
        if not fault or name not in AT[Fault(fault)]:
            return Fault.NOTHING
        words[3] += 1
        if words[3] != words[1]:
            return Fault.NOTHING
        words[4] = _NUMBER[name]
        return Fault(fault)

    def is_done(self) -> None:
        """What lasts is in place."""
        self._words[5] = 1

    def errno_of(self, name: str) -> int:
        errnos = ERRNOS[name]
        return errnos[self._words[2] % len(errnos)]
