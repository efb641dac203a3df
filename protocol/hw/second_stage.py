"""Judging a second-stage walk: does the request go through, and if not, for which fault reason.

Models the conditions of a second-stage translation fault [VT-d 7.1.3].  What is wrong with an entry comes
before what the path lacks: permission is judged over the whole path.  Unconfirmed by a public text, and
therefore choices of the model: a path that is present but lacks the right is SGN.6 or SGN.7, an entry with
R = W = 0 is SSS.2; an atomic request without both rights is reported for the write it cannot do.
"""

from __future__ import annotations

from protocol.hw.faults import FaultReason
from protocol.pt import bits
from protocol.pt.walk import Outcome, Walk

INTERRUPT_RANGE = range(
    0xFEE0_0000, 0xFEF0_0000
)  # writes there are interrupts: no translation may lead to it


def second_stage_fault(found: Walk, address: int, *, read: bool, write: bool) -> FaultReason | None:
    """Why a request for `address` (an atomic one reads and writes) fails after the walk `found`; None: it
    goes through.
    """
    if found.outcome is Outcome.RESERVED:
        return FaultReason.SSS_3
    if found.outcome is Outcome.ABSENT:
        return FaultReason.SSS_2
    if write and not found.rights & bits.WRITE:
        return FaultReason.SGN_6
    if read and not found.rights & bits.READ:
        return FaultReason.SGN_7
    return FaultReason.SGN_8 if found.hpa(address) in INTERRUPT_RANGE else None
