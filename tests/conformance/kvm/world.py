"""What a case plays with: processes, VMs, vCPUs and named files, fresh for it and closed with it."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from protocol.units import MIB
from qemu_shim.vmm.dirty_ring import DirtyRing
from qemu_shim.vmm.kvm_client import GuestMemfd, Kvmd, Vm
from qemu_shim.vmm.process import MemFd, Process, Uffd
from qemu_shim.vmm.vcpu import Vcpu
from tests.conformance.kvm.caps import CAPS
from tests.conformance.kvm.cases import Case
from tests.conformance.kvm.cpu import Cpu
from tests.conformance.kvm.step import UnknownWord

CONTROL_SIZE = 4 * MIB
CASE_HVA, CASE_SIZE = 0x1000_0000_0000, 64 * MIB

# Memory of ours, where no case maps any.
CONTROL_HVA = 0x7000_0000_0000
BUFFER_HVA, BUFFER_SIZE = 0x7100_0000_0000, MIB
READONLY_HVA = 0x7200_0000_0000
KERNEL_HVA = 0xFFFF_8880_0000_0000

BAD_POINTERS = {
    "null": 0,
    "bad": BUFFER_HVA + 4 * BUFFER_SIZE,
    "unmapped": BUFFER_HVA + 4 * BUFFER_SIZE,
    "readonly": READONLY_HVA,
    "kernel": KERNEL_HVA,
}
_BEFORE_HOLE = re.compile(r"(\d+)_bytes_then_hole")


def pointer(said: str | int) -> tuple[int, int]:
    """Where something is said to lie, and how much may be written from there on."""
    if isinstance(said, int):
        return said, BUFFER_SIZE if said == BUFFER_HVA else 0
    if said in BAD_POINTERS:
        return BAD_POINTERS[said], 0
    near = _BEFORE_HOLE.fullmatch(said.replace("ends_in_hole", "4_bytes_then_hole"))
    if near:
        return BUFFER_HVA + BUFFER_SIZE - int(near[1]), int(near[1])
    match said:
        case "buffer":
            return BUFFER_HVA, BUFFER_SIZE
        case "unaligned":
            return BUFFER_HVA + 1, BUFFER_SIZE - 1
    raise UnknownWord(f"unknown pointer {said!r}")


class KernelObjects:
    """One case's kernel objects.  What it did not ask for at the start is made when it is named."""

    def __init__(self, kvmd: Kvmd, case: Case, process: Process, vm: Vm, on_end: AsyncExitStack) -> None:
        self.process = process
        self.vm = vm
        self.files: dict[str, MemFd] = {}
        self.saved: dict[str, GuestMemfd | int] = {}  # by `$name`
        self.children: list[Process] = []
        self.uffd: Uffd | None = None
        self._kvmd = kvmd
        self._cpl = case.cpl
        self._on_end = on_end
        self._vcpus: dict[int, Vcpu] = {}
        self._cpus: dict[int, Cpu] = {}
        self._rings: dict[int, DirtyRing] = {}
        self._other_process: Process | None = None

    def closing(self, close: Callable[[], Any]) -> None:
        self._on_end.callback(close)

    async def other_process(self) -> Process:
        if self._other_process is None:
            self._other_process = await self._kvmd.start_process()
            self.closing(self._other_process.close)
        return self._other_process

    async def other_vm(self) -> Vm:
        """A second VM of the same process."""
        vm = await self._kvmd.create_vm(self.process)
        self.closing(vm.close)
        return vm

    async def create_vcpu(self, vm: Vm, number: int, **how: Any) -> None:
        vcpu = await vm.create_vcpu(number, **how)
        self.closing(vcpu.close)
        if vm is self.vm:
            self._vcpus[number] = vcpu

    async def vcpu(self, number: int) -> Vcpu:
        if number not in self._vcpus:
            await self.create_vcpu(self.vm, number)
        return self._vcpus[number]

    async def cpu(self, number: int) -> Cpu:
        if number not in self._cpus:
            self._cpus[number] = Cpu(await self.vcpu(number), self._cpl)
        return self._cpus[number]

    async def ring(self, number: int) -> DirtyRing:
        if number not in self._rings:
            self._rings[number] = await (await self.vcpu(number)).dirty_ring()
            self.closing(self._rings[number].close)
        return self._rings[number]

    def file(self, name: str) -> MemFd:
        """A memfd by the name an earlier step gave it, or a guest_memfd that one saved."""
        if name in self.files:
            return self.files[name]
        saved = self.saved.get(_saved_as(name))
        if not isinstance(saved, MemFd):
            raise UnknownWord(f"no step made a file {name!r}")
        return saved

    def save(self, name: str, memfd: GuestMemfd) -> None:
        """Under its name, and as the one that was made last."""
        self.saved[_saved_as(name)] = self.saved[_saved_as("gmem")] = memfd

    def fd(self, recorded: int | str) -> GuestMemfd | int:
        """The fd that a step passes: a number as it is, or one an earlier step saved."""
        if isinstance(recorded, int):
            return recorded
        recorded = _saved_as(recorded)
        if recorded == "$devnull" and recorded not in self.saved:
            self.saved[recorded] = fd = os.open(os.devnull, os.O_RDWR)
            self.closing(lambda: os.close(fd))
        if recorded not in self.saved:
            raise UnknownWord(f"no step saved {recorded}")
        return self.saved[recorded]


def _saved_as(name: str) -> str:
    return name if name.startswith("$") else f"${name}"


@asynccontextmanager
async def world_of(kvmd: Kvmd, case: Case) -> AsyncIterator[KernelObjects]:
    """What the case starts from."""
    async with AsyncExitStack() as on_end:
        process = await kvmd.start_process()
        on_end.callback(process.close)
        vm = await kvmd.create_vm(process)
        on_end.callback(vm.close)
        await process.mmap(BUFFER_SIZE, addr=BUFFER_HVA)
        await process.mmap(BUFFER_SIZE, addr=READONLY_HVA, prot="r")
        if case.with_control_slot:
            await _enable(vm, case)
            await process.mmap(CONTROL_SIZE, addr=CONTROL_HVA)
            await vm.set_user_memory_region(0, 0, CONTROL_SIZE, CONTROL_HVA)
        else:
            await process.mmap(CASE_SIZE, addr=CASE_HVA)
        yield KernelObjects(kvmd, case, process, vm, on_end)


async def _enable(vm: Vm, case: Case) -> None:
    for cap, argument in (
        ("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", case.manual),
        ("KVM_CAP_DIRTY_LOG_RING", case.ring),
    ):
        if argument is not None:
            await vm.enable_cap(CAPS[cap], argument)
