"""A vCPU as user space runs it: its CPU and its emulator, and KVM_RUN.

Models KVM_RUN as far as the table is concerned [KVM x86.c].  KVM_RUN is given what the
guest executes, and at which privilege: at 3 the CPU executes it, at 0 KVM's emulator does.  Code that
stopped is kept, and goes on with a KVM_RUN that brings none.  In system-management mode the vCPU has a
root of its own, for address space 1, which is never lent out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvmd.core.cpu.cpu import Cpu
from kvmd.core.cpu.emulator import Emulator
from kvmd.core.cpu.exits import DONE, Exit, GuestCode, Resume
from kvmd.core.cpu.guest_ram import GuestRam
from kvmd.core.cpu.program import Instruction, Program
from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from protocol.errors import UapiError
from protocol.units import GfnSpan

CPU_PRIVILEGE = 3


@dataclass(frozen=True, slots=True)
class RunResult:
    """What KVM_RUN gives back: why it returned, instructions finished, and all reads since the code began."""

    exit: Exit
    done: bool
    finished: int
    reads: list[bytes]


class Vcpu:
    """`ram` is the guest's memory as KVM itself reaches it on behalf of this vCPU, outside of SMM."""

    def __init__(
        self, arch: VcpuArch, frames: GuestFrames, dirty_log: DirtyLog, fault_path: FaultPath
    ) -> None:
        self.arch = arch
        self.running = False
        self._awaits_io = False  # user space was asked for an access [vcpu->mmio_needed]
        rams = [GuestRam(arch, as_id, frames, dirty_log) for as_id in range(frames.slots.address_spaces)]
        self.ram = rams[0]
        self._emulators = [Emulator(ram) for ram in rams]
        self._cpus = [
            Cpu(arch, as_id, frames, dirty_log, fault_path, emulator)
            for as_id, emulator in enumerate(self._emulators)
        ]
        self._program: Program | None = None
        self._code: GuestCode | None = None

    def flush_tlb(self, span: GfnSpan | None) -> None:
        self.arch.tlb_flushes += 1
        for cpu in self._cpus:
            cpu.flush_tlb(span)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """For one ioctl at a time.  EBUSY, where the kernel's would wait for vcpu->mutex [KVM kvm_main.c]."""
        if self.running:
            raise UapiError(errno.EBUSY, f"vCPU {self.arch.id} is running")
        self.running = True
        try:
            yield
        finally:
            self.running = False

    async def run(
        self,
        program: Sequence[Instruction] | None,
        cpl: int = CPU_PRIVILEGE,
        *,
        smm: bool = False,
        mmio_data: bytes = b"",
        immediate_exit: bool = False,
    ) -> RunResult:
        """KVM_RUN: new code, or None to go on with the last, whose load gets `mmio_data` if it awaits it.
        With `immediate_exit` the guest does not run: an access that user space was asked for is completed
        first, and may ask for more [KVM x86.c, complete_userspace_io before wants_to_run].
        """
        with self.loaded():
            data = mmio_data if self._awaits_io else None
            if program is not None:
                self._start(program, cpl, as_id=int(smm))
                data = None
            self.arch.immediate_exit = immediate_exit
            left = await self._go_on(data)
        self.arch.exit_reason = left.reason
        self._awaits_io = left.mmio is not None
        if left is DONE:
            self._code = None
        ran = self._program
        return RunResult(left, left is DONE, ran.finished if ran else 0, list(ran.reads) if ran else [])

    async def _go_on(self, data: bytes | None) -> Exit:
        """Until the guest leaves; code that ends in an error is not gone on with."""
        try:
            if self.arch.immediate_exit and data is None:
                return self.arch.interrupted()
            return DONE if self._code is None else await Resume(self._code, data)
        except BaseException:
            self._code, self._awaits_io = None, False
            raise

    def _start(self, program: Sequence[Instruction], cpl: int, as_id: int) -> None:
        """EINVAL: this KVM was built without that address space."""
        if as_id >= len(self._cpus):
            raise UapiError(errno.EINVAL, f"vCPU {self.arch.id}: there is no system-management mode")
        if self._code is not None:
            self._code.close()
        memory = self._cpus[as_id] if cpl == CPU_PRIVILEGE else self._emulators[as_id]
        self._program = Program(self.arch, memory, program)
        self._code = self._program.execute()
