"""Which devices may be attached to an HWPT whose pages may be absent.

Models the RFC's open point of devices that fault only in part [RFC 00/42]: the PCIe capability does not say
on which of its paths a device survives a page that is not there, so either the device declares it, or an
administrator lists those known to, or everything is trusted as the series does.  A device that does not is
attached only with all of guest memory pinned.  A driver that pins on demand what its device must not miss
vouches for it: trust, or the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from iommufdd.core.hardware import FunctionInfo


class Policy(StrEnum):
    TRUST = "trust"
    ALLOW_LIST = "allow-list"
    DECLARED = "declared"


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    kind: Policy = Policy.DECLARED
    allowed: frozenset[str] = frozenset()  # addresses, for ALLOW_LIST

    def objection(self, info: FunctionInfo) -> str | None:
        """Why this device must not meet an absent page, or None."""
        if self.kind is Policy.ALLOW_LIST and info.address not in self.allowed:
            return f"{info.name} at {info.address} is not on the list of devices that may fault"
        if self.kind is Policy.DECLARED and info.fault_capability != "full":
            return f"{info.name} survives an absent page on {_PATHS[info.fault_capability]} of its paths"
        return None


_PATHS = {"partial": "some", "none": "none"}
