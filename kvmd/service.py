"""kvmd's objects as files: request -> core -> reply.

Front door (a connection to kvmd's socket), /dev/kvm, VM, vCPU, mm, TDP FD, and an importer's channel
each answer the requests of their table below.  A VM lives while any fd that belongs to it does: its
own, a vCPU's, a TDP FD's, wherever the last copy is held [RFC 04/42].
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from kvmd.config import Settings
from kvmd.core.host_mm import Mm, Prot
from kvmd.core.invariants import check_vm
from kvmd.core.memslot import Region
from kvmd.core.page_fault import RESOLVED
from kvmd.core.stats import vm_stats
from kvmd.core.tdp_fd import CreateTdpFd, ExportedTdp, FaultType
from kvmd.core.vcpu import Access, Vcpu
from kvmd.core.vm import Kvm
from kvmd.importers import Lease, RemoteImporter
from kvmd.memory import HostMemory
from protocol.errors import UapiError
from protocol.flow import Flow
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.door import Door
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import kvm as uapi
from protocol.uapi import names
from protocol.uapi import tdp_fd as tdp
from protocol.units import Gfn, Gpa, Hva, Level

log = structlog.get_logger("kvmd")

T = TypeVar("T")

_LEVEL_OF_SIZE = {4096: Level(1), 2 << 20: Level(2), 1 << 30: Level(3)}
_PROT = {"none": Prot.NONE, "r": Prot.READ, "rw": Prot.READ | Prot.WRITE}


@dataclass(slots=True, eq=False)
class VmFile:
    app: Kvmd
    vm: Kvm
    refs: int = 1  # fds of the VM, its vCPUs and its TDP FDs


@dataclass(slots=True, eq=False)
class VcpuFile:
    owner: VmFile
    vcpu: Vcpu


@dataclass(slots=True, eq=False)
class MmFile:
    app: Kvmd
    mm: Mm


@dataclass(slots=True, eq=False)
class TdpFile:
    owner: VmFile
    exported: ExportedTdp
    leases: list[Lease] = field(default_factory=list)  # what keeps the table lent out


@dataclass(slots=True, eq=False)
class Importer:
    """An importer's channel; it holds no reference, its TDP FD does."""

    tdp: TdpFile
    channel: Channel | None = None
    name: str = ""
    ops: RemoteImporter | None = None
    lease: Lease | None = None


class Kvmd:
    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.memory = HostMemory(settings)
        self.host = self.memory.host
        self.files = Files(loop)
        self.vms: list[Kvm] = []
        self.mms: dict[int, MmFile] = {}
        self.door = Door(loop, FRONT_DOOR, self)

    async def start(self) -> None:
        """kvmd needs nobody."""

    def close(self) -> None:
        self.door.close()
        self.files.close()
        self.memory.close()

    # -- lifetimes -------------------------------------------------------------------------------------

    def put_vm(self, owner: VmFile) -> None:
        owner.refs -= 1
        if owner.refs == 0:
            self.vms.remove(owner.vm)
            self.loop.flows.spawn(self._destroy_vm(owner.vm))

    async def _destroy_vm(self, vm: Kvm) -> None:
        await vm.destroy()
        log.info("vm destroyed", vm=vm.id)
        self._forget(vm.mm)

    async def exit_mm(self, mm: Mm) -> None:
        await mm.exit()
        self._forget(mm)

    def _forget(self, mm: Mm) -> None:
        if mm.exited and not mm.notifiers:
            self.host.forget_mm(mm)


# -- front door ----------------------------------------------------------------------------------------


def _open(app: Kvmd, message: uapi.Open, fds: Fds) -> Answer:
    if message.path != names.KVM_PATH:
        raise UapiError(errno.ENOENT, f"open {message.path!r}: here is only {names.KVM_PATH}")
    fd, _, _ = app.files.open(DEV_KVM, app)
    return Answer({}, [fd])


def _mm_create(app: Kvmd, message: uapi.MmCreate, fds: Fds) -> Answer:
    held = MmFile(app, app.host.create_mm())
    fd, held.mm.token, _ = app.files.open(MM, held, _mm_closed)
    app.mms[held.mm.token] = held
    return Answer({}, [fd])


def _mm_closed(held: MmFile) -> None:
    held.app.mms.pop(held.mm.token, None)  # not there yet if its fd found no room
    held.app.loop.flows.spawn(held.app.exit_mm(held.mm))


def _tdp_fd_get(app: Kvmd, message: tdp.TdpFdGet, fds: Fds) -> Answer:
    importer = Importer(app.files.find(fds.peek(0), TdpFile))
    fd, _, importer.channel = app.files.open(IMPORTER, importer, _importer_closed)
    return Answer({}, [fd])


def _stats(app: Kvmd, message: uapi.Stats, fds: Fds) -> Body:
    return {
        "vms": [vm_stats(vm) for vm in app.vms],
        "processes": len(app.mms),
        "frames": app.host.frames.in_use,
        "table_pages": app.host.pool.in_use,
    }


def _check(app: Kvmd, message: uapi.Check, fds: Fds) -> Body:
    return {"violations": [violation for vm in app.vms for violation in check_vm(vm)]}


FRONT_DOOR: Service[Kvmd] = Service(
    "kvmd",
    {
        "OPEN": Method(uapi.Open, _open),
        "MM_CREATE": Method(uapi.MmCreate, _mm_create),
        "TDP_FD_GET": Method(tdp.TdpFdGet, _tdp_fd_get, 1),
        "STATS": Method(uapi.Stats, _stats),
        "CHECK": Method(uapi.Check, _check),
    },
)

# -- /dev/kvm ------------------------------------------------------------------------------------------


def _get_api_version(app: Kvmd, message: uapi.KvmGetApiVersion, fds: Fds) -> Body:
    return {"ret": names.KVM_API_VERSION}


def _create_vm(app: Kvmd, message: uapi.KvmCreateVm, fds: Fds) -> Answer:
    if message.type != 0:
        raise UapiError(errno.EINVAL, f"KVM_CREATE_VM type {message.type}: only 0")
    held = app.files.find(fds.peek(0), MmFile)
    owner = VmFile(app, Kvm(app.host, held.mm))
    app.vms.append(owner.vm)
    fd, _, _ = app.files.open(VM, owner, app.put_vm)
    return Answer({}, [fd])


DEV_KVM: Service[Kvmd] = Service(
    "/dev/kvm",
    {
        "KVM_GET_API_VERSION": Method(uapi.KvmGetApiVersion, _get_api_version),
        "KVM_CREATE_VM": Method(uapi.KvmCreateVm, _create_vm, 1),
    },
)

# -- VM ------------------------------------------------------------------------------------------------


async def _holding(owner: VmFile, flow: Flow[T]) -> T:
    """A request in progress keeps the VM as an ioctl keeps its file: it may outlive the fd it came over."""
    owner.refs += 1
    try:
        return await flow
    finally:
        owner.app.put_vm(owner)


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
    await _holding(owner, owner.vm.set_memory_region(region))
    return {}


def _create_tdp_fd(owner: VmFile, message: uapi.KvmCreateTdpFd, fds: Fds) -> Answer:
    exported = owner.vm.create_tdp_fd(CreateTdpFd(message.as_id, message.mode, message.pad))
    owner.refs += 1
    fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner, exported), _tdp_fd_closed)
    return Answer({}, [fd])


def _tdp_fd_closed(held: TdpFile) -> None:
    held.owner.app.loop.flows.spawn(_release_tdp_fd(held))


async def _release_tdp_fd(held: TdpFile) -> None:
    """The last copy is closed; an importer that died may have left a walker behind, so wait for its lease."""
    for lease in list(held.leases):
        await lease.ended
    held.owner.vm.release_tdp_fd(held.exported)
    held.owner.app.put_vm(held.owner)


VM: Service[VmFile] = Service(
    "kvm-vm",
    {
        "KVM_CREATE_VCPU": Method(uapi.KvmCreateVcpu, _create_vcpu),
        "KVM_SET_USER_MEMORY_REGION": Method(uapi.KvmSetUserMemoryRegion, _set_user_memory_region),
        "KVM_CREATE_TDP_FD": Method(uapi.KvmCreateTdpFd, _create_tdp_fd),
    },
)

# -- vCPU ----------------------------------------------------------------------------------------------


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
    result = await _holding(held.owner, held.vcpu.run(accesses))
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

# -- mm ------------------------------------------------------------------------------------------------


async def _mmap(held: MmFile, message: uapi.Mmap, fds: Fds) -> Body:
    hva = None if message.addr is None else Hva(message.addr)
    level = _LEVEL_OF_SIZE[message.page_size]
    return {"addr": await held.mm.mmap(hva, message.size, _PROT[message.prot], level)}


async def _munmap(held: MmFile, message: uapi.Munmap, fds: Fds) -> Body:
    await held.mm.munmap(Hva(message.addr), message.size)
    return {}


async def _madvise(held: MmFile, message: uapi.Madvise, fds: Fds) -> Body:
    await held.mm.madvise_dontneed(Hva(message.addr), message.size)
    return {}


async def _move_pages(held: MmFile, message: uapi.MovePages, fds: Fds) -> Body:
    return {"moved": await held.mm.migrate(Hva(message.addr), message.size)}


def _mm_read(held: MmFile, message: uapi.MmRead, fds: Fds) -> Body:
    return {"data": held.mm.read(Hva(message.addr), message.size)}


def _mm_write(held: MmFile, message: uapi.MmWrite, fds: Fds) -> Body:
    held.mm.write(Hva(message.addr), message.data)
    return {}


MM: Service[MmFile] = Service(
    "mm",
    {
        "MMAP": Method(uapi.Mmap, _mmap),
        "MUNMAP": Method(uapi.Munmap, _munmap),
        "MADVISE": Method(uapi.Madvise, _madvise),
        "MOVE_PAGES": Method(uapi.MovePages, _move_pages),
        "READ": Method(uapi.MmRead, _mm_read),
        "WRITE": Method(uapi.MmWrite, _mm_write),
    },
)

# -- TDP FD and its importers --------------------------------------------------------------------------

# Any ioctl on the TDP FD is ENODEV [RFC 04/42].
TDP_FD: Service[TdpFile] = Service("tdp_fd", {}, unknown_errno=errno.ENODEV)


def _get_metadata(importer: Importer, message: tdp.TdpGetMetadata, fds: Fds) -> Body:
    return {"meta": importer.tdp.exported.meta.to_bytes()}


def _register(importer: Importer, message: tdp.TdpRegisterImporter, fds: Fds) -> Answer:
    if importer.ops is not None:
        raise UapiError(errno.EBUSY, f"this channel is registered as {importer.name!r}")
    assert importer.channel is not None
    app = importer.tdp.owner.app
    lease = Lease(app.loop)
    ops = RemoteImporter(importer.channel, lease)
    window_fds: list[int] = []
    try:
        windows, window_fds = app.memory.share()
        importer.tdp.exported.register_importer(message.name, ops)
    except UapiError:
        for fd in window_fds:
            os.close(fd)
        lease.withdraw()
        raise
    importer.name, importer.ops, importer.lease = message.name, ops, lease
    importer.tdp.leases.append(lease)
    return Answer({"windows": windows}, [*window_fds, lease.theirs])


async def _unregister(importer: Importer, message: tdp.TdpUnregisterImporter, fds: Fds) -> Body:
    await _forget_importer(importer)
    return {}


async def _forget_importer(importer: Importer) -> None:
    """It is told of flushes until its lease ends: until then something may walk on its behalf (I13)."""
    ops, lease, importer.ops = importer.ops, importer.lease, None
    if ops is not None and lease is not None:
        await lease.ended
        importer.tdp.leases.remove(lease)
        importer.tdp.exported.unregister_importer(importer.name, ops)


def _importer_closed(importer: Importer) -> None:
    importer.tdp.owner.app.loop.flows.spawn(_forget_importer(importer))


async def _fault(importer: Importer, message: tdp.TdpFault, fds: Fds) -> Body:
    exported, vm = importer.tdp.exported, importer.tdp.owner.vm
    kind = FaultType(message.read, message.write, message.exec)
    flow = vm.fault_exported(exported, message.mm, Gfn(message.gfn), kind)
    result = await _holding(importer.tdp.owner, flow)
    if result not in RESOLVED:
        raise UapiError(errno.EFAULT, f"gfn {message.gfn:#x}: {result.name.lower()}")
    return {}


IMPORTER: Service[Importer] = Service(
    "tdp-importer",
    {
        "TDP_GET_METADATA": Method(tdp.TdpGetMetadata, _get_metadata),
        "TDP_REGISTER_IMPORTER": Method(tdp.TdpRegisterImporter, _register),
        "TDP_UNREGISTER_IMPORTER": Method(tdp.TdpUnregisterImporter, _unregister),
        "TDP_FAULT": Method(tdp.TdpFault, _fault),
    },
)
