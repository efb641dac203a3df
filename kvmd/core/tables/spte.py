"""Making entries: what kvmd stores for a page, for a table, and for a gfn without a slot.

Models make_spte and make_nonleaf_spte with the RFC's bit layout [RFC 24/42], [RFC 33/42]: write-back
memory with guest PAT ignored, accessed set at once, dirty set at once when writable.  Nothing depends
on who asked, so an entry a device's fault made equals, bit for bit, the one a vCPU's would have been
(RFC-30).
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.entry import is_access_tracked, is_mmio
from protocol.pt.walk import WalkRules
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, Hpa, Level, Pfn, pages_of_level

MMIO_GENERATION_MASK = (1 << bits.MMIO_GENERATION_BITS) - 1

_LEAF = bits.READ | bits.EXEC | bits.MEMTYPE_WB | bits.IGNORE_PAT | bits.MMU_PRESENT
_WRITABLE = bits.WRITE | bits.HOST_WRITABLE | bits.MMU_WRITABLE


def make_leaf(
    pfn: Pfn,
    level: Level,
    *,
    writable: bool,
    ad_enabled: bool,
    accessed: bool = True,
    executable: bool = True,
) -> int:
    """An entry that maps `pfn` (the first frame of its size); a prefetch does not count as an access."""
    assert pfn % pages_of_level(level) == 0, f"pfn {pfn:#x} is not aligned for level {level}"
    entry = (_LEAF if executable else _LEAF & ~bits.EXEC) | pfn << PAGE_SHIFT
    if level > LEVEL_4K:
        entry |= bits.PAGE_SIZE_BIT
    if writable:
        entry |= _WRITABLE
    if ad_enabled:
        entry |= (bits.ACCESSED if accessed else 0) | (bits.DIRTY if writable else 0)
    else:
        entry |= bits.AD_DISABLED
    return entry


def make_table_entry(table: Hpa, *, ad_enabled: bool) -> int:
    """An entry that points to the table page at `table`."""
    return table | bits.RWX | bits.MMU_PRESENT | (bits.ACCESSED if ad_enabled else bits.AD_DISABLED)


def split_child(leaf: int, level: Level, index: int) -> int:
    """Entry `index` of the table that replaces a huge `leaf` of `level`: same rights, same memory.  Only a
    huge leaf may lack X [KVM make_small_spte]."""
    child_level = Level(level - 1)
    child = leaf + (index * pages_of_level(child_level) << PAGE_SHIFT)
    if child_level > LEVEL_4K:
        return child
    saved = bits.SAVED_SHIFT if is_access_tracked(leaf) else 0
    return child & ~bits.PAGE_SIZE_BIT | bits.EXEC << saved


def is_young(entry: int) -> bool:
    """Whether a present leaf counts as used since it was last aged [KVM is_accessed_spte]."""
    if entry & bits.AD_TYPE_MASK == bits.AD_DISABLED:
        return not is_access_tracked(entry)
    return entry & bits.ACCESSED != 0


def aged(entry: int) -> int:
    """The leaf as not used: A cleared; without A/D bits no access at all, R and X saved, so that the next one
    faults [KVM mark_spte_for_access_track] (RFC-99)."""
    if entry & bits.AD_TYPE_MASK == bits.AD_DISABLED:
        return entry & ~bits.RWX | (entry & (bits.READ | bits.EXEC)) << bits.SAVED_SHIFT
    return entry & ~bits.ACCESSED


def restored(entry: int) -> int:
    """The leaf as it was before it was aged, but for W."""
    if not is_access_tracked(entry):
        return entry
    saved = (bits.READ | bits.EXEC) << bits.SAVED_SHIFT
    return entry & ~saved | (entry & saved) >> bits.SAVED_SHIFT


def make_mmio_entry(gfn: Gfn, generation: int) -> int:
    """An entry that remembers that `gfn` had no slot in memslot generation `generation` [RFC 24/42]."""
    entry = bits.MMIO | gfn << PAGE_SHIFT
    for low, width, shift in bits.MMIO_GENERATION:
        entry |= (generation >> low & (1 << width) - 1) << shift
    return entry


def mmio_generation(entry: int) -> int:
    """The generation an MMIO entry was made in, as far as the entry has room for it."""
    return sum((entry >> shift & (1 << width) - 1) << low for low, width, shift in bits.MMIO_GENERATION)


def mmio_is_fresh(entry: int, generation: int) -> bool:
    """Whether `entry` is MMIO and no memslot changed since it was made."""
    return is_mmio(entry) and mmio_generation(entry) == generation & MMIO_GENERATION_MASK


def check_entry(entry: int, level: Level, *, leaf: bool, rules: WalkRules) -> None:
    """Assert what the metadata promises importers: no reserved bit, never bit 11 (I2, I17)."""
    reserved = rules.reserved_leaf[level] if leaf else rules.reserved_table[level]
    assert entry & (reserved | bits.SNOOP) == 0, f"entry {entry:#018x} at level {level} sets reserved bits"
    assert entry & 63 not in rules.illegal, f"entry {entry:#018x}: illegal combination"
