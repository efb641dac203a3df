"""The KVM domain: what the VT-d driver makes of an exported TDP, and whether a unit can walk it at all.

Models drivers/iommu/intel/kvm.c of the series [RFC 18/42], [RFC 19/42], [RFC 20/42], [RFC 21/42]: the
checks at allocation in their order, the same again before every attach, and the PASID entry that makes
the unit walk KVM's root.  Differences, each a defect mended: flags are checked (B-16), widths are
compared with widths (B-17), a unit without a second stage is refused (B-15).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from protocol.errors import UapiError
from protocol.hw.caps import Cap, Ecap
from protocol.hw.pasid_entry import AW_OF_LEVEL, PasidEntry, Pgtt
from protocol.pt import bits
from protocol.pt.geometry import ROOT_LEVELS, address_bits
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta
from protocol.units import Hpa, Level


@dataclass(frozen=True, slots=True)
class KvmDomain:
    """`did` tags everything the unit caches of it."""

    root: Hpa
    level: Level
    did: int

    @property
    def width(self) -> int:
        """Bits of a guest address."""
        return address_bits(self.level)

    def pasid_entry(self, ecap: Ecap) -> PasidEntry:
        """Second stage only, snooping enforced, no accessed or dirty bits [RFC 19/42]."""
        return PasidEntry(
            present=True,
            aw=AW_OF_LEVEL[self.level],
            pgtt=Pgtt.SECOND_STAGE,
            ss_ptr=self.root,
            did=self.did,
            pwsnp=bool(ecap.smpwc),
            pgsnp=True,
        )


def check_metadata(meta: ExportedTdpMeta, flags: int) -> None:
    """What the driver asks of a table before it looks at the unit [RFC 18/42], [RFC 21/42]."""
    if flags:
        raise UapiError(
            errno.EOPNOTSUPP, f"flags {flags:#x}: a KVM HWPT has none, it is no nest parent either"
        )
    if meta.type != TYPE_EPT:
        raise UapiError(errno.EINVAL, f"exported TDP of type {meta.type}: VT-d walks EPT (1) only")
    if meta.level not in ROOT_LEVELS:
        raise UapiError(errno.EOPNOTSUPP, f"exported TDP with {meta.level} levels: 4 or 5")
    for row in meta.rsvd_bits_mask:
        for level, mask in enumerate(row, 1):
            if not mask & bits.SNOOP:
                raise UapiError(errno.EOPNOTSUPP, f"KVM may set bit 11 at level {level}: reserved here")


def what_is_missing(meta: ExportedTdpMeta, cap: Cap, ecap: Ecap) -> str | None:
    """Why this unit cannot walk that table, or None [RFC 20/42]."""
    needs = (
        (ecap.smts, "no scalable mode (ECAP.SMTS), so no PGSNP"),
        (ecap.sc, "no snoop control (ECAP.SC): non-coherent DMA could not be prevented"),
        (ecap.smpwc, "page walks are not coherent (ECAP.SMPWC): KVM does not flush cache lines"),
        (ecap.ssts, "no second stage (ECAP.SSTS)"),
        (
            meta.max_huge_page_level <= cap.max_huge_page_level,
            f"leaves of level {meta.max_huge_page_level} (CAP.SSLPS has {cap.max_huge_page_level})",
        ),
        (meta.level in cap.levels, f"a root of {meta.level} levels (CAP.SAGAW has {sorted(cap.levels)})"),
        (
            address_bits(meta.level) <= cap.mgaw,
            f"{address_bits(meta.level)} address bits (CAP.MGAW {cap.mgaw})",
        ),
    )
    missing = [why for satisfied, why in needs if not satisfied]
    return "; ".join(missing) or None
