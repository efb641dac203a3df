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
        fd, _, _ = owner.app.files.open(VCPU, VcpuFile(owner, vcpu), _vcpu_closed)
    except UapiError:
        owner.vm.vcpus.remove(vcpu)
        raise
    return Answer({}, [fd])


def _vcpu_closed(held: VcpuFile) -> None:
    held.vcpu.kick()  # a guest that polls would keep its VM for ever
    held.owner.app.put_vm(held.owner)


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


def _create_tdp_fd(owner: VmFile, message: uapi.KvmCreateTdpFd, fds: Fds) -> Answer:
    exported = owner.vm.create_tdp_fd(CreateTdpFd(message.as_id, message.mode, message.pad))
    owner.refs += 1
    fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner, exported), tdp_fd_closed)
    return Answer({}, [fd])


async def _page_track_add(owner: VmFile, message: uapi.PageTrackAdd, fds: Fds) -> Body:
    await holding(owner, owner.vm.track_page(Gpa(message.gpa)))
    return {}


async def _page_track_remove(owner: VmFile, message: uapi.PageTrackRemove, fds: Fds) -> Body:
    await holding(owner, owner.vm.untrack_page(Gpa(message.gpa)))
    return {}


VM: Service[VmFile] = Service(
    "kvm-vm",
    {
        "KVM_CREATE_VCPU": Method(uapi.KvmCreateVcpu, _create_vcpu),
        "KVM_SET_USER_MEMORY_REGION": Method(uapi.KvmSetUserMemoryRegion, _set_user_memory_region),
        "KVM_CREATE_TDP_FD": Method(uapi.KvmCreateTdpFd, _create_tdp_fd),
        "PAGE_TRACK_ADD": Method(uapi.PageTrackAdd, _page_track_add),
        "PAGE_TRACK_REMOVE": Method(uapi.PageTrackRemove, _page_track_remove),
    },
)
