"""At which addresses of a process another MMU maps the process's pages, and at which a guest has others.

An MMU that fills a table of its own (`hmm.Mirror`) reaches what is mapped at an address of the process.
Where gfns became private a guest's CPUs have pages of a guest_memfd instead, and no notifier tells: device
and CPU would go on in different memory, and neither know.  So whoever comes second is refused.

Invariant with its home here: I27 no address is both.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from protocol.errors import UapiError
from protocol.units import Hva

Claim = Callable[[Hva, Hva], bool]  # on some byte of start..end


class Claims:
    """Of one address space."""

    def __init__(self) -> None:
        self.mapped: list[Claim] = []  # by MMUs other than a VM's
        self.replaced: list[Claim] = []  # by private memory, or soon

    def check_mapping(self, start: Hva, end: Hva) -> None:
        """May an MMU map start..end?  EBUSY."""
        if any(claim(start, end) for claim in self.replaced):
            raise UapiError(
                errno.EBUSY,
                f"hva {start:#x}..{end:#x} is no RAM of the guest's, whose memory there is private: "
                "have it converted to shared first",
            )

    def check_replacing(self, start: Hva, end: Hva) -> None:
        """May a guest have private memory in place of start..end?  EBUSY."""
        if any(claim(start, end) for claim in self.mapped):
            raise UapiError(
                errno.EBUSY,
                f"hva {start:#x}..{end:#x} is mapped for a device by another MMU, which would keep the "
                "shared pages: unmap it there first",
            )
