"""What KVM does to a root, and to whom it speaks of it: what one root of a VM may have and another not.

Models nothing of the kernel's, where every root is the CPUs' and all of this is done to each.  The review of
the series asked for a root of the IOMMU's own [RFC review]: devices alone walk it, and what KVM does to an
entry only to hear of the next access costs a device an IO page fault, dearer than what it tells.  Each
attribute names one behaviour, and whoever has that behaviour asks for it; nobody asks which root it is.
User space spells a policy by a bit an attribute (`RootPolicy.of`), so another combination needs no code
(docs/decisions/0021).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntFlag

from protocol.errors import UapiError
from protocol.units import LEVEL_1G, LEVEL_4K, Level


class RootBehaviour(IntFlag):
    """KVM_TDP_FD_ROOT_*, the model's: arg 0 of KVM_CAP_TDP_FD_ROOT_POLICY."""

    AGES = 1
    LOGS = 2
    TRACKS = 4
    NX_HUGE = 8
    TOLD_ALL = 16
    ZAPPED_WHOLE = 32
    FILLED_BESIDE = 64


ALL_BEHAVIOURS = sum(RootBehaviour)


@dataclass(frozen=True, slots=True)
class RootPolicy:
    """`max_huge_page_level`: the largest leaf it gets, if host page and slot allow one."""

    cpus: bool  # CPUs walk it, and the IOMMU as well once it is lent
    ages: bool  # a page that the host looks at is marked not used in it
    logs: bool  # a slot that logs takes rights away in it; else what it lets devices write is always dirty
    tracks: bool  # a tracked gfn is not writable in it
    nx_huge: bool  # its huge leaves lose X while KVM says so
    told_all: bool  # importers hear of every flush; else of those that made something of it stale
    zapped_whole: bool  # a slot that goes takes all leaves along; else its own alone
    filled_beside: bool  # what is faulted in there or in the CPUs' root is mapped in both
    max_huge_page_level: Level = LEVEL_1G

    @classmethod
    def of(cls, behaviours: int, max_huge_page_level: int) -> RootPolicy:
        """Of a root that devices alone walk; level 0: the largest.  EINVAL: no such behaviour or level."""
        if behaviours & ~ALL_BEHAVIOURS:
            raise UapiError(
                errno.EINVAL, f"behaviours {behaviours:#x} of a root: at most {ALL_BEHAVIOURS:#x} is known"
            )
        if max_huge_page_level and not LEVEL_4K <= max_huge_page_level <= LEVEL_1G:
            raise UapiError(
                errno.EINVAL,
                f"largest leaf of level {max_huge_page_level}: 1 to 3, or 0 for what is possible",
            )
        asked = RootBehaviour(behaviours)
        return cls(
            cpus=False,
            ages=RootBehaviour.AGES in asked,
            logs=RootBehaviour.LOGS in asked,
            tracks=RootBehaviour.TRACKS in asked,
            nx_huge=RootBehaviour.NX_HUGE in asked,
            told_all=RootBehaviour.TOLD_ALL in asked,
            zapped_whole=RootBehaviour.ZAPPED_WHOLE in asked,
            filled_beside=RootBehaviour.FILLED_BESIDE in asked,
            max_huge_page_level=Level(max_huge_page_level) if max_huge_page_level else LEVEL_1G,
        )


CPUS = RootPolicy(
    cpus=True,
    ages=True,
    logs=True,
    tracks=True,
    nx_huge=True,
    told_all=True,
    zapped_whole=True,
    filled_beside=False,
)
"""Of what CPUs walk, in each address space; and of what is lent, unless user space asks for another."""

IOMMU_OWN = RootPolicy.of(RootBehaviour.FILLED_BESIDE, 0)
"""KVM_CAP_TDP_FD_OWN_ROOT: nothing is done to it that a device would fault on."""
