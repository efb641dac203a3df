"""The interrupt address range: what a device writes there is an interrupt message and never memory.

Models requests without PASID to 0xFEEx_xxxx [VT-d 3.14]: they are not translated, whatever a table says of
that address; an aligned write of four bytes is a message, anything else is refused.  No table maps the
range for a device, and none has to.  An access that runs into the range meets it at its first byte there:
what lies before is done, because no request crosses 4 KiB [PCIe 2.2.7].

Unconfirmed by a public text, and therefore a choice of the model: the reason SGN.8 of such a refusal.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protocol.units import Hpa, Iova

START: Final = Iova(0xFEE0_0000)
END: Final = Iova(0xFEF0_0000)
MESSAGE_BYTES: Final = 4


class InterruptMessage(NamedTuple):
    rid: int
    addr: Iova
    data: int


def touches(start: Iova | Hpa, size: int) -> bool:
    """Does any byte of start..start+size lie in the range?"""
    return start < END and start + size > START


def is_message(start: Iova, size: int) -> bool:
    """Is a write of that shape an interrupt message?"""
    return size == MESSAGE_BYTES and touches(start, size) and start % MESSAGE_BYTES == 0
