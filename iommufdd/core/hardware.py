"""The hardware as the VT-d driver and the IOMMU core reach it: units, functions, and what each can do.

Ports, and what enumeration found [VT-d 10.4], [PCIe 10].  Every call may raise UapiError: ENODEV once the
silicon is gone, and what the hardware itself refuses (EINVAL, EBUSY).  A refused call changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocol.hw.caps import Cap, Ecap
from protocol.hw.qi import Descriptor
from protocol.units import Pasid


class Unit(Protocol):
    """One remapping unit."""

    @property
    def cap(self) -> Cap: ...
    @property
    def ecap(self) -> Ecap: ...

    async def submit(self, descriptors: list[Descriptor]) -> None:
        """Queue descriptors; returns when the wait that ends them completed."""

    async def write_pasid_entry(self, rid: int, pasid: Pasid, entry: bytes) -> None: ...


class ConfigSpace(Protocol):
    """Config space of the functions; what is not named stays as it is."""

    async def set_function(
        self,
        rid: int,
        *,
        pasid: bool | None = None,
        ats: bool | None = None,
        pri_allocation: int | None = None,
        bus_master: bool | None = None,
    ) -> None: ...


class MemoryBus(Protocol):
    """The memory bus: sets of windows handed to whoever walks tables."""

    @property
    def alive(self) -> bool:
        """Is anybody there who could walk them?  Once gone they do not come back."""

    async def remove_memory(self, memory: int) -> None: ...


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    rid: int
    name: str
    group: int
    pasid: bool
    ats: bool
    pri: bool
    pasid_required: bool  # page group responses carry the PASID if the request did
    fault_capability: str  # on which paths it survives an absent page: "full", "partial", "none"

    @property
    def address(self) -> str:
        """Bus, device and function, as lspci writes them."""
        return f"{self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7}"
