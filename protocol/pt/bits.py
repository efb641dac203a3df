"""Bits of one 64-bit entry of the shared table, as kvmd writes it and as both walkers read it.

Models an EPT entry with KVM's software bits in the places the RFC gives them [RFC 24/42], read by the
CPU under EPT rules [SDM 29.3.2] and by the remapping unit under second-stage rules [VT-d 9.8].
Invariants with their home here: I2 (bit 11 stays 0 wherever a walker looks), I3 (bit 59 says present).

An MMIO entry caches that a gfn has no slot.  Its generation lies where the RFC puts it, bit 11 included, but
R, W and X stay clear, so both walkers stop before they look at any other bit; bit 63 tells it from an
empty or a frozen one (the RFC's own mark, W and X without R, is a translation to the unit: defect B-22).
"""

from __future__ import annotations

from protocol.units import bit, bits

READ = bit(0)
WRITE = bit(1)
EXEC = bit(2)
RWX = READ | WRITE | EXEC

MEMTYPE_SHIFT = 3
MEMTYPE_MASK = bits(5, 3)
MEMTYPE_WB = 6 << MEMTYPE_SHIFT
IGNORE_PAT = bit(6)
PAGE_SIZE_BIT = bit(7)  # in an entry of level 2 or 3: it is a leaf
ACCESSED = bit(8)
DIRTY = bit(9)
SNOOP = bit(11)  # second-stage SNP in a leaf, reserved in a table entry: nobody may set it [RFC 24/42]
ADDRESS_MASK = bits(51, 12)
TRANSIENT = bit(62)  # second-stage TM, reserved in newer editions; EPT ignores it [VT-d 9.8]

# KVM's own bits, ignored by both walkers.
AD_TYPE_MASK = bits(53, 52)
AD_ENABLED = 0 << 52
AD_DISABLED = 1 << 52
AD_WRPROT_ONLY = 2 << 52
SAVED_SHIFT = 54  # R and X of an access-tracked entry, saved at bits 54 and 56
SAVED_MASK = (READ | EXEC) << SAVED_SHIFT
HOST_WRITABLE = bit(57)
MMU_WRITABLE = bit(58)
# EPT ignores bit 11 but the remapping unit wants it zero, so the marker moved from 11 to 59 [RFC 24/42].
MMU_PRESENT = bit(59)

EMPTY = 0
# A transient value no walker sees as present, that other writers meet and leave alone [RFC 36/42].
FROZEN = 0x5A0

MMIO = bit(63)  # ignored by both walkers; kvmd sets it in MMIO entries only
# (lowest bit of the generation, how many, their place in the entry) [RFC 24/42]
MMIO_GENERATION = ((0, 9, 3), (9, 7, 52), (16, 3, 60))
MMIO_GENERATION_BITS = 19

SOFTWARE_BITS = AD_TYPE_MASK | SAVED_MASK | HOST_WRITABLE | MMU_WRITABLE | MMU_PRESENT
# What both walkers ignore in every entry: 61:52 and 63 [VT-d 9.8], [SDM 29.3.2].
IGNORED_BY_BOTH = bits(61, 52) | bit(63)

assert SOFTWARE_BITS & ~IGNORED_BY_BOTH == 0, "a software bit that a walker interprets"
assert FROZEN & (RWX | MMU_PRESENT | SNOOP) == 0, "a frozen entry must be absent for both walkers"
assert MMIO & (SOFTWARE_BITS | ADDRESS_MASK | RWX) == 0, "an MMIO entry is told from any other by one bit"
assert SAVED_MASK & (HOST_WRITABLE | MMU_WRITABLE | MMU_PRESENT | AD_TYPE_MASK) == 0
