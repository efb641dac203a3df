"""Memslots by the host addresses that back them, of which several may share some.

Stands for the interval tree of struct kvm_memslots [KVM kvm_main.c]: who changes memory asks which slots lie
over it, and there may be 32,764.  Slots of one order of size are one list, sorted by where they begin: what
lies over an address begins before it by no more than the largest size of its list.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple, Protocol

from protocol.units import PAGE_SHIFT, Hva


class Backed(Protocol):
    """A slot, as far as it is told from others here."""

    @property
    def number(self) -> int: ...
    @property
    def hva(self) -> Hva: ...
    @property
    def npages(self) -> int: ...


class _Begins(NamedTuple):
    hva: int
    number: int


class HvaIndex:
    def __init__(self) -> None:
        self._by_order: dict[int, list[_Begins]] = {}

    def add(self, slot: Backed) -> None:
        insort(self._by_order.setdefault(_order(slot), []), _Begins(slot.hva, slot.number))

    def remove(self, slot: Backed) -> None:
        order = _order(slot)
        places = self._by_order[order]
        del places[bisect_left(places, _Begins(slot.hva, slot.number))]
        if not places:
            del self._by_order[order]

    def near(self, start: Hva, end: Hva) -> list[int]:
        """Numbers of slots, in their order: all that lie over start..end, and a few that lie before it."""
        numbers: list[int] = []
        for order, places in self._by_order.items():
            first = bisect_left(places, (start - (1 << order + PAGE_SHIFT) + 1,))
            numbers += [place.number for place in places[first : bisect_left(places, (end,))]]
        return sorted(numbers)


def _order(slot: Backed) -> int:
    """Of so many pages, as a power of two, rounded up."""
    return (slot.npages - 1).bit_length()
