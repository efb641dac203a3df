"""Page requests: the entries of the queue through which a device asks for a page.

Models the 32-byte page request descriptor [VT-d 7.4] and, of PCIe's page request interface, what
the entry carries of it [PCIe 10.4].  Requests with the same `prgi` form a page request group; the
one with `last` set closes it, and the group gets one page_group_response.  Must hold:
  - at most 512 groups of a function are outstanding: `prgi` has 9 bits;
  - a stop marker is queued in order like any request, and is never answered.
Private data (bits 9 and 255:128 of older editions) are reserved here, as the kernel treats them.
A request without PASID is legal: a KVM domain answers those of RID_PASID [RFC 23/42].
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protocol.hw.fields import (
    NO_PASID,
    FormatError,
    Layout,
    at,
    covered,
    flag,
    load,
    page_at,
    require_zero,
    store,
)
from protocol.units import Iova, Pasid, bits

PAGE_REQUEST_SIZE: Final = 32
PAGE_REQUEST_TYPE: Final = 1
PRGI_MAX: Final = (1 << 9) - 1


class PageRequest(NamedTuple):
    rid: int
    prgi: int
    addr: Iova  # of the page
    last: bool
    read: bool = False
    write: bool = False
    exec: bool = False
    priv: bool = False
    pasid_present: bool = False
    pasid: Pasid = NO_PASID

    @property
    def named_pasid(self) -> Pasid | None:
        return self.pasid if self.pasid_present else None

    @property
    def is_stop_marker(self) -> bool:
        """The device will send no more requests of this kind: L = 1, R = W = 0, with a PASID or without
        [PCIe 10.4], [VT-d 7.10].
        """
        return self.last and not (self.read or self.write)

    def to_bytes(self) -> bytes:
        return store(_TYPE_BITS | LAYOUT.pack(self), PAGE_REQUEST_SIZE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> PageRequest:
        """FormatError for a wrong length, another type, or a reserved bit."""
        word = load(raw, PAGE_REQUEST_SIZE, "page request")
        if _TYPE.get(word) != PAGE_REQUEST_TYPE:
            raise FormatError(f"page request: type {_TYPE.get(word):#x}, not {PAGE_REQUEST_TYPE:#x}")
        require_zero(word, RESERVED, "page request")
        return cls(**LAYOUT.unpack(word))


def reply_to(raw: bytes) -> tuple[int, int, Pasid | None, bool]:
    """Requester, group, PASID, and whether an answer is due, of an entry whose other fields make no sense."""
    word = load(raw, PAGE_REQUEST_SIZE, "page request")
    last = LAYOUT["last"].get(word) and _TYPE.get(word) == PAGE_REQUEST_TYPE
    pasid = Pasid(LAYOUT["pasid"].get(word)) if LAYOUT["pasid_present"].get(word) else None
    return LAYOUT["rid"].get(word), LAYOUT["prgi"].get(word), pasid, bool(last)


_TYPE: Final = at(7, 0)
_TYPE_BITS: Final = _TYPE.put(PAGE_REQUEST_TYPE)
LAYOUT: Final = Layout(
    {
        "pasid_present": flag(8),
        "rid": at(31, 16),
        "pasid": at(51, 32, Pasid),
        "exec": flag(52),
        "priv": flag(53),
        "read": flag(64),
        "write": flag(65),
        "last": flag(66),
        "prgi": at(75, 67),
        "addr": page_at(127, 76, Iova),
    }
)
RESERVED: Final = bits(255, 0) & ~covered({**LAYOUT, "type": _TYPE})

assert bits(15, 9) | bits(63, 54) | bits(255, 128) == RESERVED
