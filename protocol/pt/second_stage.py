"""VT-d second-stage entries as iommufdd makes them, for tables that no CPU walks.

Models the VT-d driver's use of the second-stage format [VT-d 9.8]: R always, W as asked, the page-size bit,
nothing else.  Bit 11 stays 0 (the PASID entry's PGSNP enforces snooping), and so do A and D (no SSADS).  A
table entry gives every right, so that the leaf alone decides; what is not readable is absent.
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.format import NEVER, Match, Right, TableFormat
from protocol.pt.geometry import MAX_LEAF_LEVEL, MAX_LEVEL

_PRESENT = Match(bits.READ, bits.READ)
_HUGE = bits.READ | bits.PAGE_SIZE_BIT
_LEVELS = range(2, MAX_LEVEL + 1)

SECOND_STAGE = TableFormat(
    name="second stage",
    address=bits.ADDRESS_MASK,
    table=(
        NEVER,
        NEVER,
        *(Match(_HUGE, bits.READ) if level <= MAX_LEAF_LEVEL else _PRESENT for level in _LEVELS),
    ),
    leaf=(NEVER, _PRESENT, *(Match(_HUGE, _HUGE) if n <= MAX_LEAF_LEVEL else NEVER for n in _LEVELS)),
    table_bits=(0, 0, *[bits.READ | bits.WRITE for _ in _LEVELS]),
    leaf_bits=0,
    read=Right.by_bit(bits.READ),
    write=Right.by_bit(bits.WRITE),
    execute=Right(0, 0, 0),  # a device's right to execute is none of the table's
)
