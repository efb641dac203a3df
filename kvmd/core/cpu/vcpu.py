"""A vCPU: its roots, its CPU and its emulator, and KVM_RUN.

Models struct kvm_vcpu and KVM_RUN as far as the table is concerned [KVM x86.c].  KVM_RUN is given what the
guest executes, and at which privilege: at 3 the CPU executes it, at 0 KVM's emulator does.  Code that
stopped is kept, and goes on with a KVM_RUN that brings none.  In system-management mode the vCPU has a
root of its own, for address space 1, which is never lent out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmd.core.cpu.cpu import Cpu
from kvmd.core.cpu.emulator import Emulator
from kvmd.core.cpu.exits import DONE, Exit, GuestCode, Resume
from kvmd.core.cpu.program import Instruction, Program
from kvmd.core.slots.memslot import MAX_ADDRESS_SPACES
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.kvm_run import ExitReason
from protocol.trace import TRACE, KvmDirtyRingExit
from protocol.units import GfnSpan

if TYPE_CHECKING:
    from kvmd.core.vm import Kvm

CPU_PRIVILEGE = 3


@dataclass(frozen=True, slots=True)
class RunResult:
    """What KVM_RUN gives back: why it returned, instructions finished, and all reads since the code began."""

    exit: Exit
    done: bool
    finished: int
    reads: list[bytes]


class Vcpu:
    def __init__(self, vm: Kvm, vcpu_id: int) -> None:
        self.id = vcpu_id
        self.maxphyaddr = 0  # until KVM_SET_CPUID2
        self.roots: list[Root | None] = [None] * MAX_ADDRESS_SPACES
        self.ept_violations = 0
        self.mmio_sptes_made = 0
        self.tlb_flushes = 0
        self.running = False
        self.immediate_exit = False  # of the KVM_RUN under way
        self._reason = ExitReason.UNKNOWN  # kvm_run.exit_reason, which not every KVM_RUN writes
        self._awaits_io = False  # user space was asked for an access [vcpu->mmio_needed]
        self._vm = vm
        self._kicked = False
        self._emulators = [Emulator(vm, self, as_id) for as_id in range(MAX_ADDRESS_SPACES)]
        self._cpus = [Cpu(vm, self, as_id, emulator) for as_id, emulator in enumerate(self._emulators)]
        self._program: Program | None = None
        self._code: GuestCode | None = None

    def load_root(self, as_id: int = 0) -> Root:
        """The root it runs on in an address space; a new one after its old became obsolete."""
        mmu, root = self._vm.mmu, self.roots[as_id]
        if root is not None and root.invalid:
            mmu.put_root(root)
            root = None
            self._vm.flusher.reclaim()
        if root is None:
            role = self._vm.host.features.role_of(self.maxphyaddr, as_id)
            root = self.roots[as_id] = mmu.get_root(role)
        return root

    def flush_tlb(self, span: GfnSpan | None) -> None:
        self.tlb_flushes += 1
        for cpu in self._cpus:
            cpu.flush_tlb(span)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """For one ioctl at a time.  EBUSY, where the kernel's would wait for vcpu->mutex [KVM kvm_main.c]."""
        if self.running:
            raise UapiError(errno.EBUSY, f"vCPU {self.id} is running")
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
            self.immediate_exit = immediate_exit
            left = await self._go_on(data)
        self._reason = left.reason
        self._awaits_io = left.mmio is not None
        if left is DONE:
            self._code = None
        ran = self._program
        return RunResult(left, left is DONE, ran.finished if ran else 0, list(ran.reads) if ran else [])

    async def _go_on(self, data: bytes | None) -> Exit:
        """Until the guest leaves; code that ends in an error is not gone on with."""
        try:
            if self.immediate_exit and data is None:
                return self._interrupted()
            return DONE if self._code is None else await Resume(self._code, data)
        except BaseException:
            self._code, self._awaits_io = None, False
            raise

    def _start(self, program: Sequence[Instruction], cpl: int, as_id: int) -> None:
        """EINVAL: this KVM was built without that address space."""
        if as_id >= self._vm.slots.address_spaces:
            raise UapiError(errno.EINVAL, f"vCPU {self.id}: there is no system-management mode")
        if self._code is not None:
            self._code.close()
        memory = self._cpus[as_id] if cpl == CPU_PRIVILEGE else self._emulators[as_id]
        self._program = Program(self, memory, program)
        self._code = self._program.execute()

    @property
    def must_leave(self) -> bool:
        """No entering the guest with a dirty ring that is full."""
        return self._vm.dirty_log.ring_full(self.id)

    async def enter(self) -> None:
        """Leave for as long as we must, then enter."""
        while self.immediate_exit:
            await self._interrupted()
        while self.must_leave:
            if TRACE.on:
                TRACE.emit(KvmDirtyRingExit(self.id))
            await Exit(ExitReason.DIRTY_RING_FULL)

    def _interrupted(self) -> Exit:
        """The signal that immediate_exit stands for; why the guest left last stays where it is."""
        return Exit(self._reason, errno.EINTR, f"vCPU {self.id}: immediate_exit")

    async def pause(self) -> None:
        """Let others run; a signal that came meanwhile is seen here."""
        await self._vm.host.clock.tick()
        if self._kicked:
            self._kicked = False
            await Exit(ExitReason.INTR, errno.EINTR, f"vCPU {self.id}: interrupted")

    @property
    def signal_pending(self) -> bool:
        return self._kicked

    def kick(self) -> None:
        """A signal for the thread that runs this vCPU."""
        self._kicked = True
