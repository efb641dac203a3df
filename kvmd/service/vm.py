"""A VM's requests: those of `protocol/uapi/kvm.py` that a VM fd answers.

What a request changes may have to wait for acks; until then the VM is kept, whoever closes its fd.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from kvmd.core.capability import check_extension, enable_cap
from kvmd.core.export.importer import TdpFd
from kvmd.core.export.tdp_fd import CreateTdpFd
from kvmd.core.slots.dirty_log import ClearDirtyLog
from kvmd.core.slots.guest_memfd import GuestMemfd
from kvmd.core.slots.memslot import MemoryRegion, SlotFlag
from kvmd.memory import dirty_ring_memory
from kvmd.service.ioctl import ioctl
from kvmd.service.objects import GuestMemfdFile, TdpFile, VcpuFile, VmFile
from kvmd.service.tdp_fd import TDP_FD, tdp_fd_closed
from kvmd.service.vcpu import VCPU, vcpu_closed
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import kvm as uapi
from protocol.uapi.message import Message
from protocol.uapi.mm import Ftruncate, Pread, PunchHole, Pwrite
from protocol.units import Gpa, Hva


async def _punch_hole(held: GuestMemfdFile, message: PunchHole, fds: Fds) -> Body:
    await held.owner.users.holding(held.owner.vm.private.punch_hole(held.memfd, message.offset, message.size))
    return {}


def _refuse(held: GuestMemfdFile, message: Message, fds: Fds) -> Body:
    """Its size is fixed [kvm_gmem_setattr], and there is no read or write."""
    raise UapiError(errno.EINVAL, "a guest_memfd is not resized, read or written by its fd")


GUEST_MEMFD: Service[GuestMemfdFile] = Service(
    "guest_memfd",
    {
        "PUNCH_HOLE": Method(PunchHole, _punch_hole),
        "FTRUNCATE": Method(Ftruncate, _refuse),
        "PREAD": Method(Pread, _refuse),
        "PWRITE": Method(Pwrite, _refuse),
    },
)


def _create_vcpu(owner: VmFile, message: uapi.KvmCreateVcpu, fds: Fds) -> Answer:
    vm = owner.vm
    vcpu = vm.vcpus.create(message.vcpu_id)
    held = VcpuFile(owner, vcpu)
    try:
        if vm.dirty_log.ring_bytes:
            held.ring_fd, memory = dirty_ring_memory(owner.app.kernel, vm.dirty_log.ring_bytes)
            vm.dirty_log.add_ring(vcpu.arch.id, memory)
        owner.users.get()
        fd, _, _ = owner.app.files.open(VCPU, held, vcpu_closed)
    except UapiError:
        vm.vcpus.remove(vcpu)
        raise
    return Answer({}, [fd])


def _region(message: uapi.KvmSetUserMemoryRegion) -> MemoryRegion:
    return MemoryRegion(
        message.slot,
        message.flags,
        Gpa(message.guest_phys_addr),
        message.memory_size,
        Hva(message.userspace_addr),
    )


async def _set_user_memory_region(owner: VmFile, message: uapi.KvmSetUserMemoryRegion, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.slots_change.set_memory_region(_region(message)))
    return {}


async def _set_user_memory_region2(owner: VmFile, message: uapi.KvmSetUserMemoryRegion2, fds: Fds) -> Body:
    guest_memfd = _guest_memfd(owner, fds, len(fds) - message.other_mm)
    region = replace(
        _region(message),
        version=2,
        guest_memfd_offset=message.guest_memfd_offset,
        guest_memfd=guest_memfd,
    )
    await owner.users.holding(owner.vm.slots_change.set_memory_region(region))
    return {}


def _names_guest_memfd(message: uapi.KvmSetUserMemoryRegion2) -> bool:
    return bool(message.flags & SlotFlag.GUEST_MEMFD)


def _guest_memfd(owner: VmFile, fds: Fds, count: int) -> Callable[[], GuestMemfd]:
    """What finds it when its turn has come: not every region with the flag looks at it.  The fd is looked at
    before anything sleeps, and is not kept if it is something else: it may be what the request waits for.
    """
    try:
        fd = fds.peek(0 if count else len(fds))  # EBADF when the number was no open file of the caller
        memfd = owner.app.files.find(fd, GuestMemfdFile).memfd
    except UapiError as error:
        refused = error
        fds.close()
    else:
        return lambda: memfd

    def refuse() -> GuestMemfd:
        raise refused

    return refuse


def _check_extension(owner: VmFile, message: uapi.KvmCheckExtension, fds: Fds) -> Body:
    return {"ret": check_extension(owner.vm.host.features, owner.vm, message.cap)}


def _enable_cap(owner: VmFile, message: uapi.KvmEnableCap, fds: Fds) -> Body:
    enable_cap(owner.vm, message.cap, message.flags, message.args)
    return {}


async def _get_dirty_log(owner: VmFile, message: uapi.KvmGetDirtyLog, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.dirty_log.get(message.slot, Hva(message.dirty_bitmap)))
    return {}


async def _clear_dirty_log(owner: VmFile, message: uapi.KvmClearDirtyLog, fds: Fds) -> Body:
    log = ClearDirtyLog(message.slot, message.num_pages, message.first_page, Hva(message.dirty_bitmap))
    await owner.users.holding(owner.vm.dirty_log.clear(log))
    return {}


async def _reset_dirty_rings(owner: VmFile, message: uapi.KvmResetDirtyRings, fds: Fds) -> Body:
    return {"ret": await owner.users.holding(owner.vm.dirty_log.reset_rings())}


def _create_guest_memfd(owner: VmFile, message: uapi.KvmCreateGuestMemfd, fds: Fds) -> Answer:
    memfd = owner.vm.private.create(message.size, message.flags)
    owner.users.get()
    held = GuestMemfdFile(owner, memfd)
    memfd.release = lambda: owner.app.loop.flows.spawn(owner.users.put_after(owner.vm.private.close(memfd)))
    fd, _, _ = owner.app.files.open(GUEST_MEMFD, held, lambda closed: closed.memfd.put())
    return Answer({}, [fd])


def _has_attributes(owner: VmFile) -> bool:
    return owner.vm.private.attributes.supported


async def _set_memory_attributes(owner: VmFile, message: uapi.KvmSetMemoryAttributes, fds: Fds) -> Body:
    flow = owner.vm.private.set_attributes(
        Gpa(message.address), message.size, message.attributes, message.flags
    )
    await owner.users.holding(flow)
    return {}


async def _create_tdp_fd(owner: VmFile, message: uapi.KvmCreateTdpFd, fds: Fds) -> Answer:
    argp = None if message.argp is None else Hva(message.argp)
    request = CreateTdpFd(message.as_id, message.mode, message.pad, argp)
    tdp = await owner.users.holding(TdpFd.create(owner.users, owner.vm.exports, owner.vm.fault_path, request))
    fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner.app, tdp), tdp_fd_closed)
    return Answer({}, [fd])


def _register_noncoherent_dma(owner: VmFile, message: uapi.KvmRegisterNoncoherentDma, fds: Fds) -> Body:
    owner.vm.exports.register_noncoherent_dma()
    return {}


def _unregister_noncoherent_dma(owner: VmFile, message: uapi.KvmUnregisterNoncoherentDma, fds: Fds) -> Body:
    owner.vm.exports.unregister_noncoherent_dma()
    return {}


async def _page_track_add(owner: VmFile, message: uapi.PageTrackAdd, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.write_track.add(Gpa(message.gpa)))
    return {}


async def _page_track_remove(owner: VmFile, message: uapi.PageTrackRemove, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.write_track.remove(Gpa(message.gpa)))
    return {}


async def _nx_huge_pages(owner: VmFile, message: uapi.NxHugePages, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.nx_huge.switch(on=message.on))
    return {}


async def _recover_nx_huge_pages(owner: VmFile, message: uapi.RecoverNxHugePages, fds: Fds) -> Body:
    return {"ret": await owner.users.holding(owner.vm.nx_huge.recover())}


async def _zap_gfn_range(owner: VmFile, message: uapi.ZapGfnRange, fds: Fds) -> Body:
    await owner.users.holding(owner.vm.host_changes.zap_gfn_range(Gpa(message.gpa), message.size))
    return {}


VM: Service[VmFile] = Service(
    "kvm-vm",
    {
        "KVM_CREATE_VCPU": ioctl(uapi.KvmCreateVcpu, _create_vcpu),
        "KVM_SET_USER_MEMORY_REGION": ioctl(uapi.KvmSetUserMemoryRegion, _set_user_memory_region, 32),
        "KVM_SET_USER_MEMORY_REGION2": ioctl(
            uapi.KvmSetUserMemoryRegion2, _set_user_memory_region2, 160, fds=_names_guest_memfd
        ),
        "KVM_CHECK_EXTENSION": ioctl(uapi.KvmCheckExtension, _check_extension),
        "KVM_ENABLE_CAP": ioctl(uapi.KvmEnableCap, _enable_cap, 104),
        "KVM_GET_DIRTY_LOG": ioctl(uapi.KvmGetDirtyLog, _get_dirty_log, 16),
        "KVM_CLEAR_DIRTY_LOG": ioctl(uapi.KvmClearDirtyLog, _clear_dirty_log, 24),
        "KVM_RESET_DIRTY_RINGS": ioctl(uapi.KvmResetDirtyRings, _reset_dirty_rings),
        "KVM_CREATE_GUEST_MEMFD": ioctl(uapi.KvmCreateGuestMemfd, _create_guest_memfd, 64),
        "KVM_SET_MEMORY_ATTRIBUTES": ioctl(
            uapi.KvmSetMemoryAttributes, _set_memory_attributes, 32, exists=_has_attributes
        ),
        "KVM_CREATE_TDP_FD": ioctl(uapi.KvmCreateTdpFd, _create_tdp_fd),
        "KVM_REGISTER_NONCOHERENT_DMA": ioctl(uapi.KvmRegisterNoncoherentDma, _register_noncoherent_dma),
        "KVM_UNREGISTER_NONCOHERENT_DMA": ioctl(
            uapi.KvmUnregisterNoncoherentDma, _unregister_noncoherent_dma
        ),
        "PAGE_TRACK_ADD": ioctl(uapi.PageTrackAdd, _page_track_add),
        "PAGE_TRACK_REMOVE": ioctl(uapi.PageTrackRemove, _page_track_remove),
        "NX_HUGE_PAGES": ioctl(uapi.NxHugePages, _nx_huge_pages),
        "RECOVER_NX_HUGE_PAGES": ioctl(uapi.RecoverNxHugePages, _recover_nx_huge_pages),
        "ZAP_GFN_RANGE": ioctl(uapi.ZapGfnRange, _zap_gfn_range),
    },
)
