"""RLIMIT_MEMLOCK: how many pages may be locked into memory for a process, or for the user it runs as.

Models mm->locked_vm and user->locked_vm [iommufd pages.c, iopt_pages_update_pinned]: two counts that know
nothing of each other, each held to the same limit.  Whoever pins says which of them pays.
"""

from __future__ import annotations

import errno
from typing import Final

from protocol.errors import UapiError


class LockedVm:
    """`pages` of 4 KiB; `whose`, as an error says it; `limit` None: any number."""

    def __init__(self, whose: str, limit: int | None) -> None:
        self.whose: Final = whose
        self.limit = limit
        self.pages = 0

    def charge(self, npages: int) -> None:
        """ENOMEM: with `npages` more it would be too many."""
        if self.limit is not None and self.pages + npages > self.limit:
            raise UapiError(
                errno.ENOMEM,
                f"pin of {npages} pages: {self.whose} has {self.pages} pages pinned, of {self.limit} that "
                "RLIMIT_MEMLOCK (--memlock) allows: unpin some, or raise it",
            )
        self.pages += npages

    def uncharge(self, npages: int) -> None:
        assert npages <= self.pages, f"{self.whose}: {npages} pages uncharged of {self.pages}"
        self.pages -= npages
