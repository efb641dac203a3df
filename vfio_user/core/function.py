"""What the server wants of the function it serves, and what it gives: nothing in here is a DSA's.

The session has checked every index, offset and length before it calls.  Calls come one after the other, each
when the one before has returned; UapiError: the client gets its errno.  Windows and events are the session's,
lent: they are closed behind `unmap` and behind the `set_irqs` that takes them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from protocol.units import Iova
from vfio_user.core.records import DmaFlags


class RegionIndex(IntEnum):
    """VFIO_PCI_*_REGION_INDEX; 0 to 5 are the BARs."""

    BAR0 = 0
    BAR2 = 2
    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_REGIONS: Final = len(range(RegionIndex.VGA + 1))
PCI_IRQS: Final = len(IrqIndex)


class RegionFile(NamedTuple):
    """Memory behind a region that a client may map: from `offset` in the file, in `areas` of the region
    (offset, size; none: all of it).
    """

    fd: int
    offset: int
    areas: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PciRegion:
    """`size` in bytes; 0: there is none of that index."""

    size: int = 0
    writable: bool = True
    file: RegionFile | None = None


@dataclass(frozen=True, slots=True)
class DmaWindow:
    """Memory of the client at [start, start + size) of the function's DMA; without `fd` it cannot be
    mapped, and DMA there passes by.
    """

    start: Iova
    size: int
    flags: DmaFlags
    offset: int
    fd: int | None

    @property
    def end(self) -> int:
        return self.start + self.size


class IrqEvent(Protocol):
    """An eventfd of the client's."""

    def signal(self) -> None: ...
    def close(self) -> None: ...


class PciFunction(Protocol):
    @property
    def regions(self) -> Sequence[PciRegion]:
        """PCI_REGIONS of them, by their index."""

    @property
    def irqs(self) -> Sequence[int]:
        """How many there are of each IrqIndex."""

    async def read(self, index: int, offset: int, count: int) -> bytes: ...
    async def write(self, index: int, offset: int, data: bytes) -> None: ...
    async def reset(self) -> None: ...
    async def map(self, window: DmaWindow) -> None: ...

    async def unmap(self, window: DmaWindow) -> None:
        """Back when no DMA reaches the window any more.  It cannot be refused."""

    def set_irqs(self, index: int, start: int, events: Sequence[IrqEvent | None]) -> None:
        """From now on the interrupts from `start` on are signalled by these; None: by nothing."""

    def trigger(self, index: int, number: int) -> None:
        """Raise an interrupt, as if the function had."""
