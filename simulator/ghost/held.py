"""What is pinned, and who pays for it: as many pins as somebody has, charged to him who pays for them (I6).

Whoever pins says so where he writes it down, and where he strikes it out again; the host keeps counts of its
own.  A count that is too low gives a frame away under a device, one that is too high keeps it for good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from simulator.ghost.violation import Verdicts


class Held:
    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._pins: Counter[Hashable] = Counter()  # by page of the host's, whatever its size
        self._paid: Counter[Hashable] = Counter()  # pages of 4 KiB, by who pays

    def forget(self) -> None:
        """The host died."""
        self._pins.clear()
        self._paid.clear()

    def pins(self, page: Hashable, payer: Hashable, npages: int) -> None:
        self._pins[page] += 1
        self._paid[payer] += npages

    def unpins(self, page: Hashable, payer: Hashable, npages: int) -> None:
        self._pins[page] -= 1
        self._paid[payer] -= npages

    def pays(self, before: Hashable, payer: Hashable, npages: int) -> None:
        """For what another paid for until now."""
        self._paid[before] -= npages
        self._paid[payer] += npages

    # -- what the host counts, where nothing is half written down --------------------------------------

    def counts_pins(self, page: Hashable, frame: int, pins: int) -> None:
        if pins != self._pins[page]:
            what = f"frame {frame:#x} counts {pins} pins"
            self._verdicts.say("I6", f"{what}, {self._pins[page]} of it are somebody's")

    def counts_paid(self, payer: Hashable, whose: str, npages: int) -> None:
        if npages != self._paid[payer]:
            what = f"{whose} is charged for {npages} pages"
            self._verdicts.say("I6", f"{what}, and pays for {self._paid[payer]} that are pinned")

    def settled(self) -> None:
        """Nobody has anything."""
        left = sum(self._pins.values())
        if left:
            self._verdicts.say("I6", f"{left} pins are left, and nobody has anything")
