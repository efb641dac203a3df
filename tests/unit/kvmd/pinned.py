"""A lent-out table, an importer that pins and acks by hand, and 512 pages to pin."""

from __future__ import annotations

from typing import Any

from kvmd.core.export.pinning import Account
from protocol.units import Gfn, GfnSpan
from tests.kit.lent import Lent
from tests.kit.refusals import errno_of

PAGE = 4096
BASE, PAGES = 0x200, 512
WORD = BASE + 5


class PinnedRam(Lent):
    """Gfns 0x200..0x3ff, lent out, an importer that acks by hand and pins.  `own`: in the IOMMU's root."""

    def __init__(self, **lent: Any) -> None:
        super().__init__(BASE, PAGES, **lent)
        self.account = self.vm.pinning.open()
        self.asked: list[tuple[Account, GfnSpan, int]] = []  # pins so far: whose, of what, and their names

    def pin(self, gfn: int, pages: int = 1, account: Account | None = None) -> None:
        span, account = GfnSpan.of_pages(Gfn(gfn), pages), account or self.account
        self.asked.append((account, span, self.do(self.vm.pinning.pin(account, span))))

    def unpin(self, gfn: int, pages: int = 1, account: Account | None = None) -> int:
        """The first request of that account for that span."""
        wanted = account or self.account, GfnSpan.of_pages(Gfn(gfn), pages)
        found = next(asked for asked in self.asked if asked[:2] == wanted)
        self.asked.remove(found)
        return self.do(self.vm.pinning.unpin(found[0], found[2]))

    def refused(self, gfn: int, pages: int = 1) -> int:
        return errno_of(lambda: self.pin(gfn, pages))
