"""A vCPU's requests: those of `protocol/uapi/vcpu.py`.

KVM_RUN returns when the guest has to leave to user space, as the ioctl does.
"""

from __future__ import annotations

import errno
import os

from kvmd.core.pre_fault import pre_fault_memory
from kvmd.core.vcpu import Access
from kvmd.service.ioctl import ioctl
from kvmd.service.objects import VcpuFile, holding
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Service
from protocol.uapi import vcpu as uapi
from protocol.units import Gpa


def _set_cpuid2(held: VcpuFile, message: uapi.KvmSetCpuid2, fds: Fds) -> Body:
    held.owner.vm.set_maxphyaddr(held.vcpu, message.maxphyaddr)
    return {}


async def _run(held: VcpuFile, message: uapi.KvmRun, fds: Fds) -> Body:
    if held.vcpu.running:
        raise UapiError(errno.EBUSY, f"vCPU {held.vcpu.id} is running")
    accesses = [
        Access(Gpa(gpa), what, None) if isinstance(what, int) else Access(Gpa(gpa), len(what), what)
        for gpa, what in message.accesses
    ]
    if sum(access.size for access in accesses) > uapi.MAX_RUN_BYTES:
        raise UapiError(errno.EINVAL, f"KVM_RUN of more than {uapi.MAX_RUN_BYTES} bytes")
    result = await holding(held.owner, held.vcpu.run(accesses))
    body: Body = {
        "exit_reason": int(result.exit_reason),
        "errno": result.errno,
        "why": result.why,
        "done": result.done,
        "reads": result.reads,
    }
    if result.mmio_bytes:
        body["mmio"] = {
            "phys_addr": result.mmio_gpa,
            "len": result.mmio_bytes,
            "is_write": result.mmio_is_write,
        }
    return body


async def _pre_fault_memory(held: VcpuFile, message: uapi.KvmPreFaultMemory, fds: Fds) -> Body:
    if held.vcpu.running:
        raise UapiError(errno.EBUSY, f"vCPU {held.vcpu.id} is running")
    flow = pre_fault_memory(held.owner.vm, held.vcpu, Gpa(message.gpa), message.size, message.flags)
    gpa, size = await holding(held.owner, flow)
    return {"gpa": gpa, "size": size}


def _mmap_dirty_ring(held: VcpuFile, message: uapi.MmapDirtyRing, fds: Fds) -> Answer:
    if held.ring_fd is None:
        raise UapiError(errno.EINVAL, f"vCPU {held.vcpu.id} has no dirty ring")
    try:
        return Answer({"size": held.owner.vm.dirty_log.ring_bytes}, [os.dup(held.ring_fd)])
    except OSError as error:
        raise UapiError(error.errno or errno.EMFILE, "no fd for the dirty ring") from None


def vcpu_closed(held: VcpuFile) -> None:
    """The vCPU itself stays, as long as its VM does."""
    if held.ring_fd is not None:
        os.close(held.ring_fd)
    held.owner.app.put_vm(held.owner)


VCPU: Service[VcpuFile] = Service(
    "kvm-vcpu",
    {
        "KVM_SET_CPUID2": ioctl(uapi.KvmSetCpuid2, _set_cpuid2, 8),
        "KVM_RUN": ioctl(uapi.KvmRun, _run),
        "KVM_PRE_FAULT_MEMORY": ioctl(uapi.KvmPreFaultMemory, _pre_fault_memory, 64, returns=True),
        "MMAP_DIRTY_RING": ioctl(uapi.MmapDirtyRing, _mmap_dirty_ring),
    },
)
