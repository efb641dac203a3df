"""A vCPU, as a VMM runs it: thin names over the requests of `protocol/uapi/vcpu.py`.

The guest's code is what KVM_RUN is given; what it leaves to user space comes back as an exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import UapiError
from qemu_shim.dirty_ring import DirtyRing
from qemu_shim.file import File


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO: the access the guest could not make."""

    gpa: int
    size: int
    is_write: bool


class Vcpu(File):
    async def set_cpuid(self, maxphyaddr: int) -> None:
        await self.ask("KVM_SET_CPUID2", maxphyaddr=maxphyaddr)

    async def run(self, accesses: Sequence[tuple[int, int | bytes]]) -> tuple[list[bytes], MmioExit | None]:
        """KVM_RUN; what the reads gave, and the exit if one came before the end.

        Raises UapiError with the errno KVM_RUN gave.
        """
        body = (await self.ask("KVM_RUN", accesses=list(accesses))).body
        if body["errno"]:
            raise UapiError(body["errno"], f"KVM_RUN: {body['why']}")
        mmio = body.get("mmio")
        left = None if mmio is None else MmioExit(mmio["phys_addr"], mmio["len"], mmio["is_write"])
        return body["reads"], left

    async def dirty_ring(self) -> DirtyRing:
        """Map the vCPU's dirty ring; EINVAL if its VM has none."""
        reply = await self.ask("MMAP_DIRTY_RING")
        return DirtyRing(reply.fds.take(0), reply.body["size"])

    async def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> tuple[int, int]:
        """KVM_PRE_FAULT_MEMORY: what is left of the range, (gpa, size)."""
        body = (await self.ask("KVM_PRE_FAULT_MEMORY", gpa=gpa, size=size, flags=flags)).body
        return body["gpa"], body["size"]
