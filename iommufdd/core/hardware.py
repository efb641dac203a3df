"""The hardware as the VT-d driver and the IOMMU core reach it: units, functions, and what each can do.

Ports, and what enumeration found [VT-d 10.4], [PCIe 10].  Every call may raise UapiError: ENODEV once the
silicon is gone, and what the hardware itself refuses (EINVAL, EBUSY).  A refused call changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.hw.caps import Cap, Ecap
from protocol.hw.pasid_entry import PasidEntry
from protocol.hw.qi import Descriptor, ResponseCode
from protocol.units import Pasid


class Unit(Protocol):
    """One remapping unit."""

    @property
    def cap(self) -> Cap: ...
    @property
    def ecap(self) -> Ecap: ...

    async def submit(self, descriptors: Sequence[Descriptor]) -> None:
        """Queue descriptors; returns when the wait that ends them completed, or what they would have dropped
        can be used by nobody."""

    def check_on_bus(self, rid: int) -> None:
        """EIO: the function was taken off the bus, or is on its way."""

    def put_pasid_entry(self, rid: int, pasid: Pasid, entry: PasidEntry) -> None:
        """Where none is present.  EIO as of `check_on_bus`."""

    def retire_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        """Not present from now on; the unit remembers it until what `qi.detach` says was submitted."""

    def clear_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        """Nobody remembers it."""

    def respond(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None) -> bool:
        """A page group response, with the PASID of the request if it had one; nobody waits for it.  False:
        there is nobody any more."""


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


class LentMemory(Protocol):
    """Windows with their lease, on the way from who lends them to who walks tables in them: a core hands it
    on and does not look inside.
    """

    def close(self) -> None:
        """Nobody took it."""


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


class Hardware(MemoryBus, ConfigSpace, Protocol):
    """What one probe found: it is there until it goes, as a whole and for good."""

    async def add_memory(self, lent: LentMemory) -> int:
        """The number of the set, for who walks tables in it."""

    @property
    def units(self) -> Sequence[Unit]: ...
    @property
    def functions(self) -> Sequence[tuple[FunctionInfo, Unit]]: ...

    @property
    def domain_ids(self) -> int:
        """How many every unit has."""
