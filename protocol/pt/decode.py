"""One entry in words, as each of its three readers sees it: the CPU, the remapping unit, KVM.

Models the format tables of an EPT entry [SDM 29.3.2] and of a second-stage entry [VT-d 9.8], and KVM's own
bits where the RFC puts them [RFC 24/42].  The same 64 bits mean different things: the unit ignores X and
the memory type, the CPU ignores bit 11, both ignore KVM's.  For people; nothing decides by it.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.pt import bits
from protocol.pt.entry import is_frozen, is_leaf
from protocol.units import Level

Names = tuple[tuple[int, str], ...]

_MEMTYPES = ("UC", "WC", "bad memory type 2", "bad memory type 3", "WT", "WP", "WB", "bad memory type 7")
_CPU: Names = ((bits.READ, "R"), (bits.WRITE, "W"), (bits.EXEC, "X"))
_CPU_LEAF: Names = ((bits.IGNORE_PAT, "IPAT"),)
_CPU_AD: Names = ((bits.ACCESSED, "A"), (bits.DIRTY, "D"))
_UNIT: Names = ((bits.READ, "R"), (bits.WRITE, "W"), (bits.SNOOP, "SNP"), (bits.TRANSIENT, "TM"))
_KVM: Names = (
    (bits.MMU_PRESENT, "present"),
    (bits.HOST_WRITABLE, "host-writable"),
    (bits.MMU_WRITABLE, "mmu-writable"),
    (bits.READ << bits.SAVED_SHIFT, "saved-R"),
    (bits.EXEC << bits.SAVED_SHIFT, "saved-X"),
)
_AD_TYPES = {
    bits.AD_ENABLED: "ad-enabled",
    bits.AD_DISABLED: "ad-disabled",
    bits.AD_WRPROT_ONLY: "ad-wrprot-only",
}


class Decoded(NamedTuple):
    """`kind`: table, page, absent or frozen; `address` is what it points to, 0 for the last two."""

    kind: str
    address: int
    cpu: tuple[str, ...]
    unit: tuple[str, ...]
    kvm: tuple[str, ...]


def decode(entry: int, level: Level) -> Decoded:
    kvm = _set(entry, _KVM)
    if not entry & bits.RWX:
        return Decoded("frozen" if is_frozen(entry) else "absent", 0, (), (), kvm)
    leaf = is_leaf(entry, level)
    cpu = _set(entry, _CPU)
    if leaf:
        cpu += (_MEMTYPES[(entry & bits.MEMTYPE_MASK) >> bits.MEMTYPE_SHIFT], *_set(entry, _CPU_LEAF))
    cpu += _set(entry, _CPU_AD if leaf else _CPU_AD[:1])
    kvm += (_AD_TYPES.get(entry & bits.AD_TYPE_MASK, "ad-type 3"),)
    unit = _set(entry, _UNIT) if entry & (bits.READ | bits.WRITE) else ()
    return Decoded("page" if leaf else "table", entry & bits.ADDRESS_MASK, cpu, unit, kvm)


def _set(entry: int, names: Names) -> tuple[str, ...]:
    return tuple(name for mask, name in names if entry & mask)
