"""A VM's requests: those of `protocol/uapi/kvm.py` that a VM fd answers.

What a request changes may have to wait for acks; until then the VM is kept, whoever closes its fd.
"""

from __future__ import annotations

from kvmd.core.memslot import Region
from kvmd.core.tdp_fd import CreateTdpFd
from kvmd.service.objects import TdpFile, VcpuFile, VmFile, holding
from kvmd.service.tdp_fd import TDP_FD, tdp_fd_closed
from kvmd.service.vcpu import VCPU
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import kvm as uapi
from protocol.units import Gpa, Hva


def _create_vcpu(owner: VmFile, message: uapi.KvmCreateVcpu, fds: Fds) -> Answer:
    vcpu = owner.vm.create_vcpu(message.vcpu_id)
    owner.refs += 1
    try:
        fd, _, _ = owner.app.files.open(VCPU, VcpuFile(owner, vcpu), lambda f: f.owner.app.put_vm(f.owner))
    except UapiError:
        owner.vm.vcpus.remove(vcpu)
        raise
    return Answer({}, [fd])


async def _set_user_memory_region(owner: VmFile, message: uapi.KvmSetUserMemoryRegion, fds: Fds) -> Body:
    region = Region(
        message.slot,
        message.flags,
        Gpa(message.guest_phys_addr),
        message.memory_size,
        Hva(message.userspace_addr),
    )
    await holding(owner, owner.vm.set_memory_region(region))
    return {}


async def _create_tdp_fd(owner: VmFile, message: uapi.KvmCreateTdpFd, fds: Fds) -> Answer:
    argp = None if message.argp is None else Hva(message.argp)
    request = CreateTdpFd(message.as_id, message.mode, message.pad, argp)
    exported = await holding(owner, owner.vm.create_tdp_fd(request))
    owner.refs += 1
    fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner, exported), tdp_fd_closed)
    return Answer({}, [fd])


def _register_noncoherent_dma(owner: VmFile, message: uapi.KvmRegisterNoncoherentDma, fds: Fds) -> Body:
    owner.vm.register_noncoherent_dma()
    return {}


def _unregister_noncoherent_dma(owner: VmFile, message: uapi.KvmUnregisterNoncoherentDma, fds: Fds) -> Body:
    owner.vm.unregister_noncoherent_dma()
    return {}


VM: Service[VmFile] = Service(
    "kvm-vm",
    {
        "KVM_CREATE_VCPU": Method(uapi.KvmCreateVcpu, _create_vcpu),
        "KVM_SET_USER_MEMORY_REGION": Method(uapi.KvmSetUserMemoryRegion, _set_user_memory_region),
        "KVM_CREATE_TDP_FD": Method(uapi.KvmCreateTdpFd, _create_tdp_fd),
        "KVM_REGISTER_NONCOHERENT_DMA": Method(uapi.KvmRegisterNoncoherentDma, _register_noncoherent_dma),
        "KVM_UNREGISTER_NONCOHERENT_DMA": Method(
            uapi.KvmUnregisterNoncoherentDma, _unregister_noncoherent_dma
        ),
    },
)
