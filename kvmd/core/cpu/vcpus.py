"""The vCPUs of one VM: made one by one, gone only with it.

Models kvm_vm_ioctl_create_vcpu, and what is asked of all of them at once: to forget translations, and how
wide the guest's addresses are [KVM kvm_main.c], [RFC 35/42].
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.host import HostKernel
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.tables.tdp import VmTdp
from protocol.errors import UapiError
from protocol.units import GfnSpan

MAX_VCPUS = 1024
MAX_VCPU_IDS = 4 * MAX_VCPUS


class Vcpus:
    """Of one VM, in the order they were made in."""

    def __init__(
        self, host: HostKernel, frames: GuestFrames, tdp: VmTdp, dirty_log: DirtyLog, fault_path: FaultPath
    ) -> None:
        self._host = host
        self._frames = frames
        self._tdp = tdp
        self._dirty_log = dirty_log
        self._fault_path = fault_path
        self._vcpus: list[Vcpu] = []

    def __iter__(self) -> Iterator[Vcpu]:
        return iter(self._vcpus)

    def __len__(self) -> int:
        return len(self._vcpus)

    def __getitem__(self, index: int) -> Vcpu:
        return self._vcpus[index]

    def create(self, vcpu_id: int) -> Vcpu:
        """EINVAL: id out of range, or too many; EEXIST: id in use."""
        if not 0 <= vcpu_id < MAX_VCPU_IDS:
            raise UapiError(errno.EINVAL, f"vCPU id {vcpu_id}: 0..{MAX_VCPU_IDS - 1}")
        if len(self._vcpus) >= MAX_VCPUS:
            raise UapiError(errno.EINVAL, f"the VM has {MAX_VCPUS} vCPUs already")
        if any(vcpu.arch.id == vcpu_id for vcpu in self._vcpus):
            raise UapiError(errno.EEXIST, f"vCPU {vcpu_id} exists")
        arch = VcpuArch(vcpu_id, self._host, self._tdp, self._dirty_log)
        vcpu = Vcpu(arch, self._frames, self._dirty_log, self._fault_path)
        self._vcpus.append(vcpu)
        return vcpu

    def remove(self, vcpu: Vcpu) -> None:
        """One that never got its fd, and so never ran."""
        self._vcpus.remove(vcpu)
        self._dirty_log.rings.pop(vcpu.arch.id, None)

    @property
    def maxphyaddr(self) -> int:
        """The smallest any of them was given; 0 while none was [RFC 35/42]."""
        return min((vcpu.arch.maxphyaddr for vcpu in self._vcpus if vcpu.arch.maxphyaddr), default=0)

    def flush_tlb(self, span: GfnSpan | None) -> None:
        for vcpu in self._vcpus:
            vcpu.flush_tlb(span)
