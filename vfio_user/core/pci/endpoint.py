"""An endpoint: config space and MSI-X in front of whatever has the registers behind its BARs.

A BAR is the silicon's but for the windows that are ours: the MSI-X table, the pending bits, and tables a
device keeps beside them.  Reset, by message or by function level reset [PCIe 6.6.2], reaches all of it; what
a client lent (windows, eventfds) stays.  What does an access across the edge of a window is not defined by
the manual, and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL
from typing import NamedTuple, Protocol

from protocol.errors import UapiError
from vfio_user.core.function import (
    PCI_IRQS,
    PCI_REGIONS,
    DmaWindow,
    IrqEvent,
    IrqIndex,
    PciRegion,
    RegionIndex,
)
from vfio_user.core.pci.capabilities import (
    DEVICE_CONTROL,
    INITIATE_FLR,
    PRI_CONTROL,
    PRI_STATUS,
    PRI_STOPPED,
    MsixPlace,
)
from vfio_user.core.pci.msix import Msix
from vfio_user.core.pci.registers import RegisterFile


class PciSilicon(Protocol):
    """What is behind the BARs; offsets and lengths lie inside them."""

    async def read(self, bar: int, offset: int, count: int) -> bytes: ...
    async def write(self, bar: int, offset: int, data: bytes) -> None: ...
    async def reset(self) -> None: ...
    async def map(self, window: DmaWindow) -> None: ...
    async def unmap(self, window: DmaWindow) -> None: ...


class BarWindow(NamedTuple):
    bar: int
    at: int
    registers: RegisterFile

    @property
    def end(self) -> int:
        return self.at + self.registers.size


class PciEndpoint:
    """The port `PciFunction`.  `bars`: the PciRegion of each, by its number."""

    def __init__(
        self,
        silicon: PciSilicon,
        config: RegisterFile,
        bars: dict[int, PciRegion],
        place: MsixPlace,
        beside: Sequence[BarWindow] = (),
    ) -> None:
        self.config = config
        self.msix = Msix(place.vectors)
        regions = {**bars, RegionIndex.CONFIG: PciRegion(config.size)}
        self.regions = [regions.get(index, PciRegion()) for index in range(PCI_REGIONS)]
        self.irqs = [place.vectors if index == IrqIndex.MSIX else 0 for index in range(PCI_IRQS)]
        self._silicon = silicon
        self._windows = [
            BarWindow(place.bar, place.table_at, self.msix.table),
            BarWindow(place.bar, place.pba_at, self.msix.pending),
            *beside,
        ]
        self._check_windows(bars)

    def _check_windows(self, bars: dict[int, PciRegion]) -> None:
        end: dict[int, int] = {}
        for window in sorted(self._windows, key=lambda each: each.at):
            assert end.get(window.bar, 0) <= window.at, f"windows of BAR {window.bar} overlap"
            end[window.bar] = window.end
        for bar, last in end.items():
            assert last <= bars[bar].size, f"BAR {bar} ends before its windows"

    async def read(self, index: int, offset: int, count: int) -> bytes:
        if index == RegionIndex.CONFIG:
            return self.config.read(offset, count)
        window = self._window(index, offset, count)
        if window is not None:
            return window.registers.read(offset - window.at, count)
        return await self._silicon.read(index, offset, count)

    async def write(self, index: int, offset: int, data: bytes) -> None:
        if index == RegionIndex.CONFIG:
            await self._configure(offset, data)
            return
        window = self._window(index, offset, len(data))
        if window is not None:
            window.registers.write(offset - window.at, data)
        else:
            await self._silicon.write(index, offset, data)

    async def reset(self) -> None:
        await self._silicon.reset()
        self.config.reset()
        for window in self._windows:
            window.registers.reset()

    async def map(self, window: DmaWindow) -> None:
        await self._silicon.map(window)

    async def unmap(self, window: DmaWindow) -> None:
        await self._silicon.unmap(window)

    def set_irqs(self, index: int, start: int, events: Sequence[IrqEvent | None]) -> None:
        assert index == IrqIndex.MSIX, f"there are no interrupts of index {index}"
        self.msix.connect(start, events)

    def trigger(self, index: int, number: int) -> None:
        assert index == IrqIndex.MSIX, f"there are no interrupts of index {index}"
        self.msix.raise_vector(number)

    async def _configure(self, offset: int, data: bytes) -> None:
        fired = self.config.write(offset, data)
        if PRI_CONTROL in fired:  # it forgets why it failed, and what it had out [PCIe 10.5.2.2]
            self.config.store(PRI_STATUS, self.config.by_name[PRI_STATUS].reset | PRI_STOPPED)
        if fired.get(DEVICE_CONTROL, 0) & INITIATE_FLR:
            await self.reset()

    def _window(self, bar: int, offset: int, count: int) -> BarWindow | None:
        """The one all of it lies in."""
        for window in self._windows:
            if window.bar == bar and window.at < offset + count and offset < window.end:
                if window.at <= offset and offset + count <= window.end:
                    return window
                raise UapiError(
                    EINVAL, f"{count} bytes at {offset:#x} of BAR {bar}: across an edge of a table"
                )
        return None
