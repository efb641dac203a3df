"""Judging an EPT walk: does the access go through, and if not, which VM exit tells of it.

Models EPT violations and misconfigurations [SDM 29.3.3] and the exit qualification of a violation
[SDM 28.2.1].  Permission is judged when the whole path is known: a misconfiguration met on it comes first,
whatever the entries above lack.  A misconfiguration's qualification is 0.  Bit 7 is always set here: the
model's guest has linear addresses only where it accesses memory by them, which is every access it makes.
Not modelled: mode-based execute control, and the bits of the linear address's own rights.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from protocol.pt import bits
from protocol.pt.walk import Outcome, Walk
from protocol.units import bit


class EptAccess(IntFlag):
    """As in bits 2:0 of the qualification, and as the rights in an entry: one mask serves both."""

    READ = bits.READ
    WRITE = bits.WRITE
    FETCH = bits.EXEC


class BasicExitReason(IntEnum):
    EPT_VIOLATION = 48
    EPT_MISCONFIG = 49


RIGHTS_SHIFT = 3  # bits 5:3: AND of R, W, X over the entries used
LINEAR_ADDRESS_VALID = bit(7)
FINAL_TRANSLATION = bit(8)  # clear: the access was to a guest paging structure


class EptExit(NamedTuple):
    reason: BasicExitReason
    qualification: int


def ept_exit(found: Walk, access: EptAccess, *, final: bool = True) -> EptExit | None:
    """The exit that `access` causes after the walk `found` by EPT rules; None: it goes through."""
    if found.outcome is Outcome.RESERVED:
        return EptExit(BasicExitReason.EPT_MISCONFIG, 0)
    if found.outcome is Outcome.MAPPED and not access & ~found.rights:
        return None
    qualification = access | found.rights << RIGHTS_SHIFT | LINEAR_ADDRESS_VALID
    return EptExit(BasicExitReason.EPT_VIOLATION, qualification | (FINAL_TRANSLATION if final else 0))
