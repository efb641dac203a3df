"""A vCPU's requests: those of `protocol/uapi/vcpu.py`.

KVM_RUN returns when the guest has to leave to user space, as the ioctl does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from kvmd.core.cpu.exits import SIGBUS_ACTION_REQUIRED
from kvmd.core.cpu.msr import set_msr
from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.cpu.program import Instruction
from kvmd.core.cpu.vcpu import RunResult
from kvmd.service.ioctl import ioctl
from kvmd.service.objects import VcpuFile
from protocol.errors import UapiError
from protocol.kernel.asked import refusal
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Service
from protocol.uapi import vcpu as uapi
from protocol.units import Gpa


def _set_cpuid2(held: VcpuFile, message: uapi.KvmSetCpuid2, fds: Fds) -> Body:
    held.owner.vm.set_maxphyaddr(held.vcpu, message.maxphyaddr)
    return {}


async def _set_msrs(held: VcpuFile, message: uapi.KvmSetMsrs, fds: Fds) -> Body:
    flow = set_msr(held.vcpu.ram, held.owner.vm.wall_clock_epoch_ns, message.index, message.value)
    return {"ret": int(await held.owner.users.holding(flow))}


async def _run(held: VcpuFile, message: uapi.KvmRun, fds: Fds) -> Body:
    if message.program is not None and _bytes(message.program) > uapi.MAX_RUN_BYTES:
        raise UapiError(errno.EINVAL, f"KVM_RUN of more than {uapi.MAX_RUN_BYTES} bytes")
    flow = held.vcpu.run(
        message.program,
        message.cpl,
        smm=message.smm,
        mmio_data=message.mmio_data or b"",
        immediate_exit=message.immediate_exit != 0,
    )
    return _kvm_run(await held.owner.users.holding(flow))


def _bytes(program: Iterable[Instruction]) -> int:
    """What a program moves: bulk reads are in the reply, bulk writes and strings take their time."""
    total = 0
    for name, *operands in program:
        if name == "r":
            total += operands[1]
        elif name == "w":
            total += len(operands[1])
        elif name in ("movs", "stos"):
            total += operands[2]
    return total


def _kvm_run(ran: RunResult) -> Body:
    """struct kvm_run, and what the guest has read."""
    left = ran.exit
    body: Body = {
        "exit_reason": int(left.reason),
        "errno": left.errno,
        "why": left.why,
        "done": ran.done,
        "finished": ran.finished,
        "reads": ran.reads,
    }
    if left.mmio is not None:
        phys_addr, size, is_write, data = left.mmio
        body["mmio"] = {"phys_addr": phys_addr, "len": size, "is_write": is_write, "data": data}
    if left.memory_fault is not None:
        body["memory_fault"] = left.memory_fault._asdict()
    if left.suberror is not None:
        body["internal"] = {"suberror": left.suberror}
    if left.sigbus is not None:
        body["signal"] = {**SIGBUS_ACTION_REQUIRED, "addr": left.sigbus}
    return body


async def _pre_fault_memory(held: VcpuFile, message: uapi.KvmPreFaultMemory, fds: Fds) -> Body:
    flow = pre_fault_memory(
        held.vcpu, held.owner.vm.fault_path, Gpa(message.gpa), message.size, message.flags
    )
    gpa, size = await held.owner.users.holding(flow)
    return {"gpa": gpa, "size": size}


def _mmap_dirty_ring(held: VcpuFile, message: uapi.MmapDirtyRing, fds: Fds) -> Answer:
    if held.ring_fd is None:
        raise UapiError(errno.EINVAL, f"vCPU {held.vcpu.arch.id} has no dirty ring")
    kernel = held.owner.app.kernel
    try:
        return Answer({"size": held.owner.vm.dirty_log.ring_bytes}, [kernel.dup(held.ring_fd)])
    except OSError as error:
        raise refusal(error, "no fd for the dirty ring") from None


def vcpu_closed(held: VcpuFile) -> None:
    """The vCPU itself stays, as long as its VM does; a guest that polls would keep that for ever."""
    held.vcpu.arch.kick()
    if held.ring_fd is not None:
        held.owner.app.kernel.close(held.ring_fd)
    held.owner.users.put()


VCPU: Service[VcpuFile] = Service(
    "kvm-vcpu",
    {
        "KVM_SET_CPUID2": ioctl(uapi.KvmSetCpuid2, _set_cpuid2, 8),
        "KVM_SET_MSRS": ioctl(uapi.KvmSetMsrs, _set_msrs, 24),
        "KVM_RUN": ioctl(uapi.KvmRun, _run),
        "KVM_PRE_FAULT_MEMORY": ioctl(uapi.KvmPreFaultMemory, _pre_fault_memory, 64, returns=True),
        "MMAP_DIRTY_RING": ioctl(uapi.MmapDirtyRing, _mmap_dirty_ring),
    },
)
