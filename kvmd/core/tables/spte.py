"""KVM's own states of an entry: aged without A/D bits, and MMIO; what its format does not know.

Models the parts of spte.c that are about software bits, with the RFC's layout [RFC 24/42], [RFC 33/42].  What
leaves and table entries are made of, `protocol/pt/ept.py` says.  Nothing depends on who asked, so an entry a
device's fault made equals, bit for bit, the one a vCPU's would have been (RFC-30).
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.entry import is_access_tracked, is_mmio
from protocol.pt.format import TableFormat
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, Level

MAY_WRITE = bits.HOST_WRITABLE | bits.MMU_WRITABLE  # both: W may be given back without a fault [KVM spte.h]
MMIO_GENERATION_MASK = (1 << bits.MMIO_GENERATION_BITS) - 1


def split_children(fmt: TableFormat, leaf: int, level: Level) -> list[int]:
    """The table that replaces a huge `leaf` of `level`: same rights, same memory.  Only a huge leaf may lack
    X [KVM make_small_spte]."""
    if level - 1 == LEVEL_4K:
        leaf |= bits.EXEC << (bits.SAVED_SHIFT if is_access_tracked(leaf) else 0)
    return fmt.split(leaf, level)


def is_young(entry: int) -> bool:
    """Whether a present leaf counts as used since it was last aged [KVM is_accessed_spte]."""
    if entry & bits.AD_TYPE_MASK == bits.AD_DISABLED:
        return not is_access_tracked(entry)
    return entry & bits.ACCESSED != 0


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
