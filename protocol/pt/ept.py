"""EPT entries as KVM makes them: write-back memory, guest PAT ignored, KVM's own bits where the RFC has them.

Models make_spte and make_nonleaf_spte [KVM spte.c] with the RFC's bit layout [RFC 24/42], [RFC 33/42].  Two
formats: with the CPU's A/D bits, and without, where the type says so (bits 53:52) and a leaf that was aged
has no right left (kvmd saves R and X).  A leaf is dirty as soon as it is writable.  The remapping unit reads
the same entries by its own rules; bit 11, which it wants clear, is set in none (I2).
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.format import NEVER, Match, Right, TableFormat
from protocol.pt.geometry import MAX_LEAF_LEVEL, MAX_LEVEL
from protocol.pt.walk import WalkRules

_PRESENT = Match(bits.MMU_PRESENT, bits.MMU_PRESENT)
_HUGE = bits.MMU_PRESENT | bits.PAGE_SIZE_BIT
_LEVELS = range(2, MAX_LEVEL + 1)
_WRITABLE = bits.WRITE | bits.HOST_WRITABLE | bits.MMU_WRITABLE


def _ept(name: str, *, ad_type: int, accessed: int, dirty: int) -> TableFormat:
    huge = [Match(_HUGE, bits.MMU_PRESENT) if level <= MAX_LEAF_LEVEL else _PRESENT for level in _LEVELS]
    return TableFormat(
        name=name,
        address=bits.ADDRESS_MASK,
        table=(NEVER, NEVER, *huge),
        leaf=(NEVER, _PRESENT, *(Match(_HUGE, _HUGE) if n <= MAX_LEAF_LEVEL else NEVER for n in _LEVELS)),
        table_bits=(0, 0, *[bits.RWX | bits.MMU_PRESENT | ad_type | accessed for _ in _LEVELS]),
        leaf_bits=bits.MEMTYPE_WB | bits.IGNORE_PAT | ad_type,
        read=Right.by_bit(bits.READ),
        write=Right(bits.WRITE, bits.WRITE, _WRITABLE | dirty),
        execute=Right.by_bit(bits.EXEC),
        accessed=accessed,
        dirty=dirty,
    )


EPT_AD = _ept("EPT", ad_type=bits.AD_ENABLED, accessed=bits.ACCESSED, dirty=bits.DIRTY)
EPT_NO_AD = _ept("EPT without A/D", ad_type=bits.AD_DISABLED, accessed=0, dirty=0)


def ept_format(rules: WalkRules, *, ad_enabled: bool) -> TableFormat:
    """The format of a table that a CPU of `rules` walks and that may be lent to an importer: never bit 11."""
    return (EPT_AD if ad_enabled else EPT_NO_AD).under(rules, never=bits.SNOOP)
