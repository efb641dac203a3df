"""A vCPU, as a VMM runs it: thin names over the requests of `protocol/uapi/vcpu.py`.

The guest's code is what KVM_RUN is given; what it leaves to user space comes back as an exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qemu_shim.vmm.dirty_ring import DirtyRing
from qemu_shim.vmm.file import File

Program = Sequence[Sequence[int | str | bytes]]


@dataclass(frozen=True, slots=True)
class MmioExit:
    """kvm_run.mmio: the access that is user space's to make; `data` is what a store writes."""

    phys_addr: int
    len: int
    is_write: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class RunResult:
    """struct kvm_run after KVM_RUN; `reads` is all that the guest's code has read since it began."""

    exit_reason: int
    errno: int
    why: str
    done: bool  # the code is at its end
    finished: int  # instructions
    reads: list[bytes]
    mmio: MmioExit | None
    memory_fault: dict[str, int] | None  # flags, gpa, size
    internal: dict[str, int] | None  # suberror
    signal: dict[str, int] | None  # siginfo: signo, code, addr


class Vcpu(File):
    async def set_cpuid(self, maxphyaddr: int) -> None:
        await self.ask("KVM_SET_CPUID2", maxphyaddr=maxphyaddr)

    async def set_msr(self, index: int, value: int) -> int:
        """KVM_SET_MSRS with one entry; how many were set."""
        ret: int = (await self.ask("KVM_SET_MSRS", index=index, value=value)).body["ret"]
        return ret

    async def dirty_ring(self) -> DirtyRing:
        """Map the vCPU's dirty ring; EINVAL if its VM has none."""
        reply = await self.ask("MMAP_DIRTY_RING")
        return DirtyRing(self.loop.kernel, reply.fds.take(0), reply.body["size"])

    async def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> tuple[int, int]:
        """KVM_PRE_FAULT_MEMORY: what is left of the range, (gpa, size)."""
        body = (await self.ask("KVM_PRE_FAULT_MEMORY", gpa=gpa, size=size, flags=flags)).body
        return body["gpa"], body["size"]

    async def run(
        self, program: Program, cpl: int = 3, smm: bool = False, *, immediate_exit: int = 0
    ) -> RunResult:
        """KVM_RUN with new code for the guest."""
        return await self._run(program=list(program), cpl=cpl, smm=smm, immediate_exit=immediate_exit)

    async def resume(self, mmio_data: bytes | None = None, *, immediate_exit: int = 0) -> RunResult:
        """KVM_RUN again: the access that failed is tried again, a load gets `mmio_data`."""
        return await self._run(program=None, mmio_data=mmio_data, immediate_exit=immediate_exit)

    async def _run(self, **fields: Any) -> RunResult:
        body = (await self.ask("KVM_RUN", **fields)).body
        mmio = body.pop("mmio", None)
        why_else = {name: body.pop(name, None) for name in ("memory_fault", "internal", "signal")}
        return RunResult(**body, mmio=None if mmio is None else MmioExit(**mmio), **why_else)
