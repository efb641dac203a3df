"""The KVM domain: what the VT-d driver makes of an exported TDP, and whether a unit can walk it at all.

Models drivers/iommu/intel/kvm.c of the series [RFC 18/42], [RFC 19/42], [RFC 20/42], [RFC 21/42]: the
checks at allocation in their order, and the same again before every attach.  Differences, each a
defect mended: flags are checked (B-16), widths are compared with widths (B-17), a unit without a second
stage is refused (B-15), and so is one in caching mode, whose absent entries KVM would have to flush (B-32).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from iommufdd.core.domain import Domain
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.pt.geometry import ROOT_LEVELS
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta

NEST_PARENT = 1 << 0


@dataclass(frozen=True, slots=True)
class KvmDomain(Domain):
    """The paging structures are KVM's."""

    COHERENT_WALKS = True


def check_metadata(meta: ExportedTdpMeta, flags: int) -> None:
    """What the driver asks of a table before it looks at the unit [RFC 18/42], [RFC 21/42]."""
    if flags & NEST_PARENT:
        raise UapiError(
            errno.EOPNOTSUPP,
            "flag NEST_PARENT: a KVM HWPT is no nest parent, faults of a nested domain are not handled",
        )
    if flags:
        raise UapiError(errno.EOPNOTSUPP, f"flags {flags:#x}: a KVM HWPT has none")
    if meta.type != TYPE_EPT:
        raise UapiError(errno.EINVAL, f"exported TDP of type {meta.type}: VT-d walks EPT (1) only")
    if meta.level not in ROOT_LEVELS:
        raise UapiError(errno.EOPNOTSUPP, f"exported TDP with {meta.level} levels: 4 or 5")
    for row in meta.rsvd_bits_mask:
        for level, mask in enumerate(row, 1):
            if not mask & bits.SNOOP:
                raise UapiError(errno.EOPNOTSUPP, f"KVM may set bit 11 at level {level}: reserved here")
