"""What a range of a process's memory consists of, for people and for checks from outside.

Models what /proc/PID/smaps and pagemap tell: pages present by size, pages swapped, and how much of it is
transparent huge pages.
"""

from __future__ import annotations

from collections import Counter

from kvmd.core.mm.page import Pte, Swapped
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.thp import is_transparent
from protocol.units import LEVEL_2M, Hva, size_of_level


def pagemap(space: AddressSpace, start: Hva, size: int) -> dict[str, object]:
    """EINVAL: not whole pages."""
    entries = space.table.within(start, space.check_range("pagemap", start, size))
    present = [entry for entry in entries if type(entry) is Pte]
    huge = [entry for entry in present if entry.level == LEVEL_2M and is_transparent(space, entry)]
    return {
        "present": dict(Counter(str(size_of_level(entry.level)) for entry in present)),
        "swapped": sum(isinstance(entry, Swapped) for entry in entries),
        "anon_huge_kib": len(huge) * size_of_level(LEVEL_2M) >> 10,
    }
