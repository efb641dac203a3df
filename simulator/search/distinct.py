"""How many different traces there were, of any number of schedules, kept in little room.

A trace's number is as good as drawn from all of 64 bits, so the least of many lie as close as there are many:
the KEPT least are kept, whose count is exact below KEPT and from there on estimated by the largest of them,
to within 1/sqrt(KEPT), one standard deviation [KMV RANDOM 2002].  What is added twice counts once, whoever
added it, and when.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from heapq import nsmallest

KEPT = 256
BITS = 64
_BYTES = BITS // 8


class Distinct:
    def __init__(self, least: Iterable[int] = ()) -> None:
        self._least = set(least)

    def add(self, traces: Iterable[int]) -> None:
        self._least = set(nsmallest(KEPT, self._least.union(traces)))

    @property
    def count(self) -> int:
        if len(self._least) < KEPT:
            return len(self._least)
        return round((KEPT - 1) * (1 << BITS) / max(self._least))

    def to_text(self) -> str:
        return base64.b64encode(b"".join(n.to_bytes(_BYTES, "big") for n in sorted(self._least))).decode()

    @classmethod
    def from_text(cls, text: str) -> Distinct:
        kept = base64.b64decode(text)
        return cls(int.from_bytes(kept[at : at + _BYTES], "big") for at in range(0, len(kept), _BYTES))
