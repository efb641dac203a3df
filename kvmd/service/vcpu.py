"""A vCPU's requests: those of `protocol/uapi/vcpu.py`.

KVM_RUN returns when the guest has to leave to user space, as the ioctl does.
"""

from __future__ import annotations

import errno

from kvmd.core.vcpu import Access
from kvmd.service.objects import VcpuFile, holding
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method, Service
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


VCPU: Service[VcpuFile] = Service(
    "kvm-vcpu",
    {
        "KVM_SET_CPUID2": Method(uapi.KvmSetCpuid2, _set_cpuid2),
        "KVM_RUN": Method(uapi.KvmRun, _run),
    },
)
