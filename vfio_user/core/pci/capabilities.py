"""The capabilities a DSA has, as rows of registers: PCI Express, MSI-X, ATS, PASID, PRI.

[PCIe 7.5.3] PCI Express of a Root Complex Integrated Endpoint, which has no link; function level reset and
TLP prefixes, without which there is no PASID.  [PCIe 7.7.2] MSI-X.  [PCIe 10.5.1] ATS, [PCIe 7.8.9] PASID,
[PCIe 10.5.2] PRI.  Offsets in a row count from its capability.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protocol.units import bit, bits
from vfio_user.core.pci.config_space import Capability
from vfio_user.core.pci.registers import RegisterRow

DEVICE_CONTROL: Final = "Device Control"
INITIATE_FLR: Final = bit(15)
PRI_CONTROL: Final = "PRI Control"
PRI_STATUS: Final = "PRI Status"
PRI_RESET: Final = bit(1)
PRI_STOPPED: Final = bit(8)

_RC_INTEGRATED_ENDPOINT: Final = 9
_MAX_PAYLOAD_256: Final = 1
_ROLE_BASED_ERRORS: Final = bit(15)
_FLR: Final = bit(28)
_RELAXED, _NO_SNOOP, _READ_512 = bit(4), bit(11), 2 << 12
_TIMEOUT_DISABLE: Final = bit(4)
_ONE_END_TO_END_PREFIX: Final = bit(21) | 1 << 22

EXPRESS: Final = Capability(
    "PCI Express",
    0x10,
    0x40,
    (
        RegisterRow("PCI Express Capabilities", 0x02, 2, _RC_INTEGRATED_ENDPOINT << 4 | 2),
        RegisterRow("Device Capabilities", 0x04, 4, _FLR | _ROLE_BASED_ERRORS | bit(5) | _MAX_PAYLOAD_256),
        RegisterRow(
            DEVICE_CONTROL,
            0x08,
            2,
            _READ_512 | _NO_SNOOP | _RELAXED,
            rw=bits(14, 11) | bits(8, 0),
            acts=INITIATE_FLR,
        ),
        RegisterRow("Device Status", 0x0A, 2, 0, rw1c=bits(3, 0)),
        RegisterRow("Device Capabilities 2", 0x24, 4, _ONE_END_TO_END_PREFIX | _TIMEOUT_DISABLE),
        RegisterRow("Device Control 2", 0x28, 2, 0, rw=_TIMEOUT_DISABLE),
    ),
)


class MsixPlace(NamedTuple):
    """Where a function has its vectors: both structures in one BAR, at these offsets."""

    vectors: int
    bar: int
    table_at: int
    pba_at: int


def msix(at: int, place: MsixPlace) -> Capability:
    assert (place.table_at | place.pba_at) % 8 == 0, f"the low bits say which BAR: {place}"
    return Capability(
        "MSI-X",
        0x11,
        at,
        (
            RegisterRow("MSI-X Message Control", 0x02, 2, place.vectors - 1, rw=bits(15, 14)),
            RegisterRow("MSI-X Table", 0x04, 4, place.table_at | place.bar),
            RegisterRow("MSI-X PBA", 0x08, 4, place.pba_at | place.bar),
        ),
    )


def ats(at: int) -> Capability:
    return Capability(
        "ATS",
        0x0F,
        at,
        (
            RegisterRow(
                "ATS Capability", 0x04, 2, bit(5)
            ),  # page aligned requests; a queue of 32, which is 0
            RegisterRow("ATS Control", 0x06, 2, 0, rw=bit(15) | bits(4, 0)),
        ),
        version=1,
    )


def pasid(at: int, *, width: int) -> Capability:
    return Capability(
        "PASID",
        0x1B,
        at,
        (
            RegisterRow("PASID Capability", 0x04, 2, width << 8 | bit(2)),  # privileged mode, no execute
            RegisterRow("PASID Control", 0x06, 2, 0, rw=bit(2) | bit(0)),
        ),
        version=1,
    )


def pri(at: int, *, capacity: int) -> Capability:
    """`capacity`: how many page requests may be outstanding."""
    return Capability(
        "PRI",
        0x13,
        at,
        (
            RegisterRow(PRI_CONTROL, 0x04, 2, 0, rw=bit(0), acts=PRI_RESET),
            RegisterRow(
                PRI_STATUS, 0x06, 2, bit(15) | PRI_STOPPED, rw1c=bits(1, 0)
            ),  # responses want a PASID
            RegisterRow("PRI Capacity", 0x08, 4, capacity),
            RegisterRow("PRI Allocation", 0x0C, 4, 0, rw=bits(31, 0)),
        ),
        version=1,
    )
