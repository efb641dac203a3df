"""What units and devices are made with: registers, config space, and where each device sits.

Models what a reader of CAP, ECAP and config space finds before anybody has touched them.  A daemon's options
are one way to make such traits, a test another; nothing here changes once it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol.hw.caps import Cap, Ecap, make_cap, make_ecap

FAULT_RECORDS_AT = 0x400  # in the register page
FAULT_RECORDS = 64
PRI_CAPACITY = 512


class InvalidateCompletion(StrEnum):
    """When a function completes what its device TLB is to drop [PCIe 10.3]: before the unit's time-out, every
    other one only behind it, or never.
    """

    IN_TIME = "in-time"
    LATE = "late"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a function has in config space, and how it came out of reset."""

    pasid: bool = True
    ats: bool = True
    pri: bool = True
    pri_capacity: int = PRI_CAPACITY  # page requests that may be outstanding [PCIe 7.8.9.4]
    pri_on: bool = False  # page requests are on already, by whoever had the function before
    invalidate_completion: InvalidateCompletion = InvalidateCompletion.IN_TIME
    control_faults: bool = True  # an absent completion record or batch list is asked for, not an error


@dataclass(frozen=True, slots=True)
class UnitTraits:
    cap: Cap
    ecap: Ecap
    haw: int
    descriptors_at_once: int | None = None  # of the invalidation queue, before its devices have a turn


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    rid: int
    unit: int
    group: int  # devices of one group cannot be told apart by the unit's translations
    function: Traits
    pasid_required: bool  # in page group responses, if the request had one
    fault_capability: str


def capabilities(*, levels: int = 4, max_page: str = "1G", **changed: int) -> tuple[Cap, Ecap]:
    """A unit in scalable mode that a KVM domain can use, but for the register fields that are `changed`."""
    cap = {
        "nd": 6,
        "sagaw": 0b0100 if levels == 4 else 0b1100,
        "mgaw": 48 if levels == 4 else 57,
        "sslps": {"4K": 0, "2M": 1, "1G": 3}[max_page],
        "mamv": 18,
        "fro": FAULT_RECORDS_AT,
        "nfr": FAULT_RECORDS,
        **dict.fromkeys(("psi", "dwd", "drd", "esrtps"), 1),
    }
    names = ("c", "qi", "dt", "sc", "prs", "pasid", "pds", "smts", "ssts", "fsts", "smpwc")
    ecap = {"pss": 20, **dict.fromkeys(names, 1)}
    of_cap = {name: value for name, value in changed.items() if name in (*cap, "cm")}
    of_ecap = {name: value for name, value in changed.items() if name not in of_cap}
    return make_cap(**{**cap, **of_cap}), make_ecap(**{**ecap, **of_ecap})
