"""Page requests that wait for the last one of their group.

Models the partial list of a device's fault parameters [RFC 15/42]: a group is begun on the domain its
function is attached to, and belongs to that attachment; with it the requests are forgotten, as is everything
after an overflow of the queue (R9).  Nobody handled them, and nothing was promised.

Invariant I24: what is held here was asked for on the HWPT its function is on now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from iommufdd.core.counts import UnitCounts
from iommufdd.core.hwpt import Hwpt
from protocol.hw.prq import PageRequest

MAX_PARTIAL = 2048  # of one function, as many as the ring has


class _PartialGroup(NamedTuple):
    hwpt: Hwpt
    requests: list[PageRequest]


class PartialGroups:
    """Those of all functions behind one unit."""

    def __init__(self, counts: UnitCounts) -> None:
        self.counts = counts
        self._groups: dict[tuple[int, int], _PartialGroup] = {}
        self._held: Counter[int] = Counter()  # by function: one that ends no group takes nobody else's room

    def gather(self, request: PageRequest, hwpt: Hwpt) -> list[PageRequest] | None:
        """The whole group when `request` is its last, else None: it is held back for `hwpt`."""
        key = request.rid, request.prgi
        if request.last:
            held = self._groups.pop(key, _PartialGroup(hwpt, [])).requests
            self._held[request.rid] -= len(held)
            return [*held, request]
        if self._held[request.rid] >= MAX_PARTIAL:
            self.counts.partial_discarded += 1
            return None
        self._groups.setdefault(key, _PartialGroup(hwpt, [])).requests.append(request)
        self._held[request.rid] += 1
        return None

    def discard(self, rids: Iterable[int] | None = None) -> None:
        """Forget all of them, or those of these functions."""
        for rid, prgi in [key for key in self._groups if rids is None or key[0] in rids]:
            self.forget(rid, prgi)

    def forget(self, rid: int, prgi: int) -> None:
        """One group, if anything of it is held: it is answered, and its index another's from now on."""
        group = self._groups.pop((rid, prgi), None)
        if group is not None:
            self._held[rid] -= len(group.requests)
            self.counts.partial_discarded += len(group.requests)

    @property
    def held(self) -> int:
        return self._held.total()

    def check(self, attached: Mapping[int, Hwpt]) -> list[str]:
        """I24, against the HWPT that each function is on now."""
        return [
            f"I24: function {rid:#x}, group {prgi}: held for HWPT {group.hwpt.id}, which it is not on"
            for (rid, prgi), group in self._groups.items()
            if attached.get(rid) is not group.hwpt
        ]
