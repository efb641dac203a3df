"""What KVM tells an importer about an exported TDP: struct kvm_exported_tdp_meta_vmx, 104 bytes.

Models the metadata of [RFC 02/42], filled as in [RFC 40/42].  The reserved masks are KVM's promise never to
set those bits, not even for software use; every one of them has bit 11 [RFC 24/42].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from protocol.pt import bits
from protocol.pt.walk import WalkRules
from protocol.units import Hpa, Level

TYPE_EPT = 1
META_BYTES = 104
MASK_LEVELS = 5
_LAYOUT = struct.Struct("<iiQi4x10Q")
assert _LAYOUT.size == META_BYTES

# First index: PTE bit 7; second: level - 1.
ReservedMasks = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExportedTdpMeta:
    type: int
    level: Level
    root_hpa: Hpa
    max_huge_page_level: Level
    rsvd_bits_mask: ReservedMasks

    def to_bytes(self) -> bytes:
        masks = (*self.rsvd_bits_mask[0], *self.rsvd_bits_mask[1])
        return _LAYOUT.pack(self.type, self.level, self.root_hpa, self.max_huge_page_level, *masks)

    @classmethod
    def from_bytes(cls, raw: bytes) -> ExportedTdpMeta:
        """Raises ValueError on a wrong length; the values are the reader's to judge."""
        if len(raw) != META_BYTES:
            raise ValueError(f"exported TDP metadata is {META_BYTES} bytes, not {len(raw)}")
        kind, level, root, huge, *masks = _LAYOUT.unpack(raw)
        return cls(kind, Level(level), Hpa(root), Level(huge), (tuple(masks[:5]), tuple(masks[5:])))


def promised_masks(rules: WalkRules) -> ReservedMasks:
    """What the writer never sets: what the CPU reserves, and bit 11."""
    table = tuple(rules.reserved_table[level] | bits.SNOOP for level in range(1, MASK_LEVELS + 1))
    leaf = tuple(rules.reserved_leaf[level] | bits.SNOOP for level in range(1, MASK_LEVELS + 1))
    # Level 1 has no table form and levels 4 and 5 no leaf form: KVM repeats the other one there.
    return (leaf[0], *table[1:]), (leaf[0], leaf[1], leaf[2], table[3], table[4])
