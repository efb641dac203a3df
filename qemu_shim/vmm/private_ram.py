"""RAM that may become private: what a VMM keeps of it, block by block.

Models RamBlockAttributes, the RamDiscardManager of memory with a guest_memfd [QEMU ram-block-attributes.c]: a
block is shared, and then it is the device's as well, or private, and then only the guest's.  The listener of
VFIO maps a block at a time, because only what was mapped as one can be unmapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qemu_shim.vmm.kvm_client import GuestMemfd


@dataclass(slots=True, eq=False)
class PrivateRam:
    """Of one memslot; offsets are bytes from its start."""

    memfd: GuestMemfd
    block: int
    private: set[int] = field(default_factory=set)

    def blocks(self, offset: int, size: int, *, private: bool) -> list[int]:
        """Those of offset..offset+size that are private, or shared.  ValueError: not whole blocks."""
        if offset % self.block or size % self.block:
            raise ValueError(f"{offset:#x}+{size:#x} is converted in blocks of {self.block:#x} bytes")
        return [at for at in range(offset, offset + size, self.block) if (at in self.private) == private]
