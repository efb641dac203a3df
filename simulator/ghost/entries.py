"""What is wrong with an entry whatever it leads to, seen when it is stored."""

from __future__ import annotations

from protocol.pt.bits import MMIO, RWX, SNOOP
from simulator.ghost.violation import Verdicts


def judge_entry(verdicts: Verdicts, at: int, entry: int, pieces: int, *, linked: bool) -> None:
    """In so many stores, into a table that is `linked` or will be."""
    if pieces != 1:
        verdicts.say("I4", f"an entry is stored at {at:#x} in {pieces} pieces")
    if entry & MMIO and entry & RWX:  # its writer takes it for absent, and walkers do not
        verdicts.say("I3", f"an MMIO entry is stored at {at:#x} with rights: {entry:#x}")
    if entry & SNOOP and entry & RWX and linked:
        verdicts.say("I2", f"an entry with bit 11 is stored at {at:#x}: {entry:#x}")
