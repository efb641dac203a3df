"""What lies over host addresses, of areas of which several may share some: memslots, or areas of an IOAS.

Stands for the interval trees that the kernel finds them by, of struct kvm_memslots [KVM kvm_main.c] and of
struct iopt_pages [Linux iommufd io_pagetable.h]: whoever changes memory asks, and there may be ten thousands.
Areas of one order of size are one list, sorted by where they begin: what lies over an address begins before
it by no more than the largest size of its list.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from protocol.units import Hva


class _Begins(NamedTuple):
    hva: int
    name: int


class HvaIndex:
    """Areas by their names, numbers that no two share."""

    def __init__(self) -> None:
        self._by_order: dict[int, list[_Begins]] = {}

    def add(self, name: int, hva: Hva, size: int) -> None:
        insort(self._by_order.setdefault(_order(size), []), _Begins(hva, name))

    def remove(self, name: int, hva: Hva, size: int) -> None:
        order = _order(size)
        begins = self._by_order[order]
        del begins[bisect_left(begins, _Begins(hva, name))]
        if not begins:
            del self._by_order[order]

    def near(self, start: Hva, end: Hva) -> list[int]:
        """Names, in their order: all that lie over start..end, and a few that lie before it."""
        names: list[int] = []
        for order, begins in self._by_order.items():
            first = bisect_left(begins, (start - (1 << order) + 1,))
            names += [name for _, name in begins[first : bisect_left(begins, (end,))]]
        return sorted(names)


def _order(size: int) -> int:
    """As a power of two, rounded up."""
    return (size - 1).bit_length()
