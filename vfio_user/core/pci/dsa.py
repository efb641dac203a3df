"""A Data Streaming Accelerator as a driver finds it on the bus: its identity, BARs, capabilities and tables.

Models the accelerator of Sapphire Rapids: BAR 0 with the registers, and on pages of their own the MSI-X table
and its pending bits, which a VMM maps apart from the rest; BAR 2 with the portals.  The permission table says
with which PASID a vector's message may be asked for [DSA 9]; its entries are the driver's `msix_perm`
[idxd registers.h], eight bytes apart.  Fewer extended capabilities than in hardware: those of DMA alone
(docs/decisions/0008).
"""

from __future__ import annotations

from typing import Final

from protocol.units import bit, bits
from vfio_user.core.function import PciRegion
from vfio_user.core.pci.capabilities import EXPRESS, MsixPlace, ats, msix, pasid, pri
from vfio_user.core.pci.config_space import FIRST_EXTENDED, Identity, bar_64, config_space
from vfio_user.core.pci.endpoint import BarWindow, PciEndpoint, PciSilicon
from vfio_user.core.pci.registers import RegisterFile, RegisterRow

IDENTITY: Final = Identity(0x8086, 0x0B25, 0x088000, 0x8086, 0x0000)
BAR0_BYTES: Final = 64 << 10
BAR2_BYTES: Final = 128 << 10
VECTORS: Final = 9  # the device's own, and one for each of eight work queues
MSIX_PLACE: Final = MsixPlace(VECTORS, bar=0, table_at=0x2000, pba_at=0x3000)
PERMISSIONS_AT: Final = 0x5000
PERMISSION_BYTES: Final = 8
PASID_BITS: Final = 20
PAGE_REQUESTS: Final = 512


def _permissions() -> RegisterFile:
    """Of each vector PASID and whether it counts."""
    rows = [
        RegisterRow(f"MSI-X Permission {n}", n * PERMISSION_BYTES, 4, 0, rw=bits(31, 12) | bit(3))
        for n in range(VECTORS)
    ]
    return RegisterFile(VECTORS * PERMISSION_BYTES, rows)


def dsa_endpoint(silicon: PciSilicon) -> PciEndpoint:
    config = config_space(
        IDENTITY,
        [*bar_64(0, BAR0_BYTES), *bar_64(2, BAR2_BYTES)],
        [EXPRESS, msix(0x80, MSIX_PLACE)],
        [
            ats(FIRST_EXTENDED),
            pasid(FIRST_EXTENDED + 0x10, width=PASID_BITS),
            pri(FIRST_EXTENDED + 0x20, capacity=PAGE_REQUESTS),
        ],
    )
    bars = {0: PciRegion(BAR0_BYTES), 2: PciRegion(BAR2_BYTES)}
    return PciEndpoint(silicon, config, bars, MSIX_PLACE, [BarWindow(0, PERMISSIONS_AT, _permissions())])
