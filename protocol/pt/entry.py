"""What one raw 64-bit entry is, from the writer's side: leaf, table entry, absent, frozen or MMIO.

Models KVM's predicates on an SPTE [RFC 24/42].  The walkers decide presence by their own rules
(`protocol/pt/walk.py`); these decide it by the software bit the writer sets with every present entry, and
`protocol/pt/check.py` holds the two together (invariant I3).
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.geometry import MAX_LEAF_LEVEL
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, Hpa, Level, Pfn


def is_present(entry: int) -> bool:
    return entry & bits.MMU_PRESENT != 0


def is_frozen(entry: int) -> bool:
    return entry == bits.FROZEN


def is_mmio(entry: int) -> bool:
    """Whether the entry caches that its gfn has no slot: absent for both walkers."""
    return entry & (bits.MMIO | bits.RWX | bits.MMU_PRESENT) == bits.MMIO


def mmio_gfn(entry: int) -> Gfn:
    """The gfn an MMIO entry is about."""
    return Gfn((entry & bits.ADDRESS_MASK) >> PAGE_SHIFT)


def is_leaf(entry: int, level: Level) -> bool:
    """Whether a present entry of `level` maps a page rather than a table."""
    return level == LEVEL_4K or (entry & bits.PAGE_SIZE_BIT != 0 and level <= MAX_LEAF_LEVEL)


def is_table(entry: int, level: Level) -> bool:
    """Whether the entry is present and points to a table of `level - 1`."""
    if level == LEVEL_4K or not entry & bits.MMU_PRESENT:
        return False
    return entry & bits.PAGE_SIZE_BIT == 0 or level > MAX_LEAF_LEVEL


def is_present_leaf(entry: int, level: Level) -> bool:
    return is_present(entry) and is_leaf(entry, level)


def is_access_tracked(entry: int) -> bool:
    """A leaf that was aged without A/D bits: present to its writer, absent for every walker."""
    return entry & bits.SAVED_MASK != 0 and entry & bits.RWX == 0


def is_writable(entry: int) -> bool:
    return entry & bits.WRITE != 0


def table_of(entry: int) -> Hpa:
    """Where the table a table entry points to lies."""
    return Hpa(entry & bits.ADDRESS_MASK)


def pfn_of(entry: int) -> Pfn:
    """Frame a leaf maps (the first one, for a huge leaf)."""
    return Pfn((entry & bits.ADDRESS_MASK) >> PAGE_SHIFT)
