"""One object of every kind the daemons know, and for each request one that is granted.

`REQUESTS` is held to the op tables of the services themselves: a new request without a row fails the tests.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from device_sim import service as silicon
from iommufdd.service import door as iommufdd
from iommufdd.service.iommufd import IOMMUFD
from iommufdd.service.vfio import VFIO
from kvmd.service import door as kvmd
from kvmd.service.fault_notes import FAULT_NOTES
from kvmd.service.hmm import HMM_MIRROR
from kvmd.service.memfd import MEMFD
from kvmd.service.mm import MM
from kvmd.service.tdp_fd import IMPORTER, TDP_FD
from kvmd.service.userfaultfd import UFFD
from kvmd.service.vcpu import VCPU
from kvmd.service.vm import GUEST_MEMFD, VM
from protocol.errors import UapiError
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Channel, Reply
from protocol.rpc.service import Service
from protocol.uapi import names
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.mirror import WireMirror
from tests.kit.daemons import eventually
from tests.kit.vmm import GUEST_START, Vmm, attach_device, bare_vm, fault_notes
from tests.kit.wire_importer import WireImporter

SERVICES: list[Service[Any]] = [
    kvmd.TRUSTING_DOOR,
    kvmd.DEV_KVM,
    MM,
    MEMFD,
    UFFD,
    VM,
    GUEST_MEMFD,
    VCPU,
    TDP_FD,
    IMPORTER,
    HMM_MIRROR,
    FAULT_NOTES,
    iommufdd.FRONT_DOOR,
    IOMMUFD,
    VFIO,
    silicon.FRONT_DOOR,
    silicon.PORTAL,
]
OPS = [(service, op) for service in SERVICES for op in service.methods]
SLOT_BYTES = 2 * MIB  # of a slot that logs, far from the RAM
SLOT_GPA = 1 << 32
WATCHED = 1 << 20  # nothing is mapped there


@dataclass(slots=True)
class Zoo:
    """`objects` by service; `spare` is a mapping nothing uses, `logged` backs slot 1, which logs."""

    host: Host
    rig: Vmm
    objects: dict[str, Channel] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    spare: int = 0
    logged: int = 0
    token: int = 0  # of the process

    async def ask(self, service: Service[Any], op: str, body: dict[str, Any], fds: list[int]) -> int:
        """The errno of the answer, 0 if it was granted, EUCLEAN for a bug.  What came with it is closed."""
        try:
            reply: Reply = await self.objects[service.name].ask(op, body, fds)
        except UapiError as error:
            return errno.EUCLEAN if "internal error" in error.why else error.errno
        reply.fds.close()
        return 0

    async def is_bug(self, service: Service[Any], op: str, body: dict[str, Any], fds: list[int]) -> bool:
        return await self.ask(service, op, body, fds) == errno.EUCLEAN

    async def grant(self, service: Service[Any], op: str) -> int:
        body, fds = REQUESTS[service.name, op](self)
        return await self.ask(service, op, body, fds)

    async def release_tdp_fd(self) -> None:
        """Every copy of it is closed, the HWPT's too."""
        await self.rig.bound[1].detach()
        await self.rig.bound[0].destroy(self.ids["kvm"])
        self.objects["tdp_fd"].close()
        self.rig.close_tdp_fd()
        await eventually(self.host.kvmd.stats, lambda s: not s["vms"][-1]["exported_tdps"], "it is released")

    def copy(self, name: str) -> int:
        return os.dup(self.fds[name])


Request = tuple[dict[str, Any], list[int]]
Make = Callable[[Zoo], Request]


def plain(**body: Any) -> Make:
    return lambda zoo: (dict(body), [])


def spare(**body: Any) -> Make:
    """Of a range nothing else uses; named as that request names it."""

    def make(zoo: Zoo) -> Request:
        return {key: zoo.spare + 16 * PAGE_SIZE if value is ... else value for key, value in body.items()}, []

    return make


def with_fd(kind: str, **body: Any) -> Make:
    return lambda zoo: (dict(body), [zoo.copy(kind)])


def object_of(kind: str, key: str, **body: Any) -> Make:
    return lambda zoo: ({key: zoo.ids[kind], **body}, [])


def _region(zoo: Zoo) -> dict[str, Any]:
    fresh = {"slot": 5, "flags": 0, "guest_phys_addr": SLOT_GPA * 2, "memory_size": PAGE_SIZE}
    return {**fresh, "userspace_addr": zoo.spare}


def _hwpt_alloc(zoo: Zoo) -> Request:
    return {
        "dev_id": zoo.ids["device"],
        "pt_id": zoo.ids["ioas"],
        "data_type": 0,
        "data_len": 0,
        "data_uptr": None,
    }, []


REQUESTS: dict[tuple[str, str], Make] = {
    ("kvmd", "OPEN"): plain(path=names.KVM_PATH),
    ("kvmd", "MM_CREATE"): plain(),
    ("kvmd", "TDP_FD_GET"): with_fd("tdp_fd"),
    ("kvmd", "HMM_MIRROR_GET"): with_fd("mm"),
    ("kvmd", "KVM_FAULT_NOTES_GET"): with_fd("kvm-vm"),
    ("kvmd", "STATS"): plain(),
    ("kvmd", "STARTED_WITH"): plain(),
    ("kvmd", "CHECK"): plain(),
    ("kvmd", "INSPECT"): with_fd("kvm-vm", vm=None),
    ("kvmd", "INSPECT_GPA"): with_fd("kvm-vm", vm=None, gpa=0),
    ("kvmd", "DUMP_TABLES"): with_fd("kvm-vm", vm=None, probes=1),
    ("/dev/kvm", "KVM_GET_API_VERSION"): plain(),
    ("/dev/kvm", "KVM_CREATE_VM"): with_fd("mm"),
    ("/dev/kvm", "KVM_CHECK_EXTENSION"): plain(cap=3),
    ("mm", "MMAP"): plain(size=PAGE_SIZE),
    ("mm", "MUNMAP"): lambda zoo: ({"addr": zoo.spare + 20 * PAGE_SIZE, "size": PAGE_SIZE}, []),
    ("mm", "MPROTECT"): spare(addr=..., size=PAGE_SIZE, prot="rw"),
    ("mm", "MREMAP"): spare(addr=..., old_size=PAGE_SIZE, new_size=PAGE_SIZE),
    ("mm", "MADVISE"): spare(addr=..., size=PAGE_SIZE, advice="dontneed"),
    ("mm", "MOVE_PAGES"): spare(addr=..., size=PAGE_SIZE),
    ("mm", "HOST_ACTION"): spare(addr=..., size=PAGE_SIZE, action="age"),
    ("mm", "PAGEMAP"): spare(addr=..., size=PAGE_SIZE),
    ("mm", "READ"): spare(addr=..., size=8),
    ("mm", "WRITE"): spare(addr=..., data=b"hostile"),
    ("mm", "FORK"): plain(),
    ("mm", "MEMFD_CREATE"): plain(name="hostile", size=PAGE_SIZE),
    ("mm", "USERFAULTFD"): plain(),
    ("memfd", "FTRUNCATE"): plain(size=3 * PAGE_SIZE),
    ("memfd", "PUNCH_HOLE"): plain(offset=0, size=PAGE_SIZE),
    ("memfd", "PREAD"): plain(offset=0, size=8),
    ("memfd", "PWRITE"): plain(offset=0, data=b"hostile"),
    ("userfaultfd", "UFFDIO_REGISTER"): lambda zoo: (_uffd_range(zoo, 8, mode="missing+wp"), []),
    ("userfaultfd", "UFFDIO_UNREGISTER"): lambda zoo: (_uffd_range(zoo, 12), []),
    ("userfaultfd", "UFFDIO_COPY"): lambda zoo: ({"dst": _page(zoo, 1), "data": bytes(PAGE_SIZE)}, []),
    ("userfaultfd", "UFFDIO_ZEROPAGE"): lambda zoo: (_uffd_range(zoo, 2), []),
    ("userfaultfd", "UFFDIO_WRITEPROTECT"): lambda zoo: (_uffd_range(zoo, 3, on=True), []),
    ("userfaultfd", "READ_EVENT"): plain(),
    ("kvm-vm", "KVM_CREATE_VCPU"): plain(vcpu_id=7),
    ("kvm-vm", "KVM_SET_USER_MEMORY_REGION"): lambda zoo: (_region(zoo), []),
    ("kvm-vm", "KVM_SET_USER_MEMORY_REGION2"): lambda zoo: (_region(zoo), []),
    ("kvm-vm", "KVM_CHECK_EXTENSION"): plain(cap=3),
    ("kvm-vm", "KVM_ENABLE_CAP"): plain(cap=168, args=[1]),
    ("kvm-vm", "KVM_GET_DIRTY_LOG"): spare(slot=1, dirty_bitmap=...),
    ("kvm-vm", "KVM_CLEAR_DIRTY_LOG"): spare(slot=1, num_pages=64, first_page=0, dirty_bitmap=...),
    ("kvm-vm", "KVM_RESET_DIRTY_RINGS"): plain(),
    ("kvm-vm", "KVM_CREATE_GUEST_MEMFD"): plain(size=PAGE_SIZE),
    ("kvm-vm", "KVM_SET_MEMORY_ATTRIBUTES"): plain(address=0, size=PAGE_SIZE, attributes=8),
    ("kvm-vm", "KVM_CREATE_TDP_FD"): plain(as_id=0),
    ("kvm-vm", "KVM_REGISTER_NONCOHERENT_DMA"): plain(),
    ("kvm-vm", "KVM_UNREGISTER_NONCOHERENT_DMA"): plain(),
    ("kvm-vm", "PAGE_TRACK_ADD"): plain(gpa=SLOT_GPA),
    ("kvm-vm", "PAGE_TRACK_REMOVE"): plain(gpa=SLOT_GPA),
    ("kvm-vm", "NX_HUGE_PAGES"): plain(on=False),
    ("kvm-vm", "RECOVER_NX_HUGE_PAGES"): plain(),
    ("kvm-vm", "ZAP_GFN_RANGE"): plain(gpa=SLOT_GPA, size=PAGE_SIZE),
    ("guest_memfd", "PUNCH_HOLE"): plain(offset=0, size=PAGE_SIZE),
    ("guest_memfd", "FTRUNCATE"): plain(size=PAGE_SIZE),
    ("guest_memfd", "PREAD"): plain(offset=0, size=8),
    ("guest_memfd", "PWRITE"): plain(offset=0, data=b"hostile"),
    ("kvm-vcpu", "KVM_SET_CPUID2"): plain(maxphyaddr=46),
    ("kvm-vcpu", "KVM_SET_MSRS"): plain(index=1, value=1),
    ("kvm-vcpu", "KVM_RUN"): plain(program=[["w", SLOT_GPA, b"hostile"]]),
    ("kvm-vcpu", "KVM_PRE_FAULT_MEMORY"): plain(gpa=SLOT_GPA, size=PAGE_SIZE),
    ("kvm-vcpu", "MMAP_DIRTY_RING"): plain(),
    ("tdp-importer", "TDP_GET_METADATA"): plain(),
    ("tdp-importer", "TDP_REGISTER_IMPORTER"): plain(name="hostile"),
    ("tdp-importer", "TDP_UNREGISTER_IMPORTER"): plain(),
    ("tdp-importer", "TDP_FAULT"): lambda zoo: (
        {"mm": zoo.token, "gfn": SLOT_GPA >> 12, "read": True, "write": False, "exec": False},
        [],
    ),
    ("tdp-importer", "TDP_PIN"): plain(gfn=SLOT_GPA >> 12, npages=1),
    ("tdp-importer", "TDP_UNPIN"): plain(pin=1),
    ("tdp-importer", "TDP_PIN_ALL"): plain(),
    ("hmm-mirror", "HMM_REGISTER"): plain(),
    ("hmm-mirror", "HMM_WATCH"): spare(start=..., size=PAGE_SIZE),
    ("hmm-mirror", "HMM_UNWATCH"): spare(start=..., size=PAGE_SIZE),
    ("hmm-mirror", "HMM_RANGE_FAULT"): plain(start=WATCHED, size=PAGE_SIZE, write=True, fault=False),
    ("hmm-mirror", "HMM_FILE_GET"): with_fd("memfd"),
    ("hmm-mirror", "HMM_FILE_PUT"): plain(file=1),
    ("hmm-mirror", "HMM_CHANGE_PROCESS"): with_fd("mm"),
    ("hmm-mirror", "HMM_PIN"): lambda zoo: ({"start": _page(zoo, 99), "size": PAGE_SIZE, "write": True}, []),
    ("hmm-mirror", "HMM_PINNED"): lambda zoo: ({"start": _page(zoo, 99), "size": PAGE_SIZE}, []),
    ("hmm-mirror", "HMM_UNPIN"): lambda zoo: ({"start": _page(zoo, 99), "size": PAGE_SIZE}, []),
    ("iommufdd", "OPEN"): with_fd("mm", path=names.IOMMU_PATH),
    ("iommufdd", "STATS"): plain(),
    ("iommufdd", "STARTED_WITH"): plain(),
    ("iommufdd", "CHECK"): plain(),
    ("iommufd", "IOMMU_DESTROY"): object_of("to_destroy", "id"),
    ("iommufd", "IOMMU_IOAS_ALLOC"): plain(),
    ("iommufd", "IOMMU_IOAS_MAP"): lambda zoo: (_ioas_map(zoo), [zoo.copy("mm")]),
    ("iommufd", "IOMMU_IOAS_UNMAP"): object_of("ioas", "ioas_id", iova=0, length=(1 << 64) - 1),
    ("iommufd", "IOMMU_IOAS_IOVA_RANGES"): object_of("ioas", "ioas_id"),
    ("iommufd", "IOMMU_IOAS_MAP_FILE"): lambda zoo: (
        {"ioas_id": zoo.ids["ioas"], "flags": 6, "fd": 7, "fd_table": [7], "start": 0, "length": PAGE_SIZE},
        [zoo.copy("mm"), zoo.copy("memfd")],
    ),
    ("iommufd", "IOMMU_IOAS_CHANGE_PROCESS"): with_fd("mm"),
    ("iommufd", "IOMMU_IOAS_COPY"): lambda zoo: (
        {"flags": 6, "src_iova": PAGE_SIZE, "length": PAGE_SIZE, **_twice(zoo.ids["ioas"])},
        [],
    ),
    ("iommufd", "IOMMU_IOAS_ALLOW_IOVAS"): object_of("ioas", "ioas_id", num_iovas=0, allowed_iovas=None),
    ("iommufd", "IOMMU_IOAS_FOLLOW_KVM"): lambda zoo: (
        {"ioas_id": zoo.ids["on_demand"]},
        [zoo.copy("kvm-vm")],
    ),
    ("iommufd", "IOMMU_OPTION"): plain(option_id=0),
    ("iommufd", "IOMMU_HWPT_ALLOC"): _hwpt_alloc,
    ("iommufd", "IOMMU_GET_HW_INFO"): object_of("device", "dev_id"),
    ("iommufd", "IOMMU_HWPT_SET_DIRTY_TRACKING"): object_of("paging", "hwpt_id"),
    ("iommufd", "IOMMU_HWPT_GET_DIRTY_BITMAP"): object_of("paging", "hwpt_id"),
    ("iommufd", "IOMMU_HWPT_INVALIDATE"): object_of("paging", "hwpt_id"),
    ("vfio-device", "VFIO_DEVICE_BIND_IOMMUFD"): with_fd("iommufd"),
    ("vfio-device", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"): object_of("kvm", "pt_id"),
    ("vfio-device", "VFIO_DEVICE_DETACH_IOMMUFD_PT"): plain(),
    ("vfio-device", "VFIO_DEVICE_PIN"): plain(iova=SLOT_GPA, length=PAGE_SIZE),
    ("vfio-device", "VFIO_DEVICE_UNPIN"): plain(iova=SLOT_GPA, length=PAGE_SIZE),
    ("vfio-device", "VFIO_DEVICE_MMAP"): plain(region=2),
    ("device_sim", "LINK"): plain(),
    ("device_sim", "STATS"): plain(),
    ("device_sim", "STARTED_WITH"): plain(),
    ("portal", "MMIO_READ"): plain(offset=0, size=8),
    ("portal", "ENQCMD"): plain(wq=0, descriptor=bytes(64)),
}


def _ioas_map(zoo: Zoo) -> dict[str, Any]:
    """Where there is room, so that it may be asked for twice."""
    body = {"ioas_id": zoo.ids["ioas"], "flags": 6, "length": PAGE_SIZE}
    return {**body, "user_va": _page(zoo, 98)}


def _twice(ioas: int) -> dict[str, Any]:
    return {"src_ioas_id": ioas, "dst_ioas_id": ioas}


def _page(zoo: Zoo, number: int) -> int:
    """A page of the range whose first eight the userfaultfd has."""
    return zoo.spare + (32 + number) * PAGE_SIZE


def _uffd_range(zoo: Zoo, number: int, **body: Any) -> dict[str, Any]:
    return {"start": _page(zoo, number), "len": PAGE_SIZE, **body}


@asynccontextmanager
async def only_closed(host: Host) -> AsyncIterator[Vmm]:
    rig = await bare_vm(host)
    try:
        yield rig
    finally:
        rig.close()


@asynccontextmanager
async def zoo_of(host: Host, number: int = 0) -> AsyncIterator[Zoo]:
    """A VM with a device attached, and one more of everything; it is all closed at the end."""
    async with only_closed(host) as rig:
        await attach_device(rig, number)
        zoo = Zoo(host, rig)
        process, vm = rig.process, rig.vm
        zoo.token = LINUX.cookie_of(process._fd)
        zoo.spare = await process.mmap(MIB)
        zoo.logged = await process.mmap(SLOT_BYTES)
        await vm.set_user_memory_region(1, SLOT_GPA, SLOT_BYTES, zoo.logged, flags=1)
        await rig.vcpu.run([("w", GUEST_START, b"here"), ("w", SLOT_GPA, b"here")])
        memfd = await process.memfd("zoo", 4 * PAGE_SIZE)
        uffd = await process.userfaultfd()
        await uffd.register(_page(zoo, 0), 8 * PAGE_SIZE, "missing+wp")
        guest_memfd = await vm.create_guest_memfd(PAGE_SIZE)
        rig.extra += [memfd, uffd, guest_memfd]
        iommu, device = rig.bound
        assert rig.tdp_fd is not None
        assert rig.portal is not None
        importer = await WireImporter.of(host, rig.tdp_fd)
        mirror = await WireMirror.registered(host, process)
        await mirror.watch(WATCHED)
        dev_kvm = (await host.kvmd.channel.ask("OPEN", {"path": names.KVM_PATH})).fds.take(0)
        ioas = (await iommu.ask("IOMMU_IOAS_ALLOC")).body["out_ioas_id"]
        doomed = (await iommu.ask("IOMMU_IOAS_ALLOC")).body["out_ioas_id"]
        zoo.ids = {"device": rig.device_id, "ioas": ioas, "kvm": rig.hwpt_id, "to_destroy": doomed}
        paging = await iommu.ask("IOMMU_HWPT_ALLOC", **_hwpt_alloc(zoo)[0])
        zoo.ids["paging"] = paging.body["out_hwpt_id"]
        zoo.ids["on_demand"] = await iommu.ioas_alloc(on_demand=True)
        files = {
            "mm": process,
            "memfd": memfd,
            "userfaultfd": uffd,
            "kvm-vm": vm,
            "guest_memfd": guest_memfd,
            "kvm-vcpu": rig.vcpu,
            "iommufd": iommu,
            "vfio-device": device,
        }
        tdp = Channel(host.loop, socket.socket(fileno=os.dup(rig.tdp_fd)), "tdp_fd")
        kvm = Channel(host.loop, socket.socket(fileno=dev_kvm), "/dev/kvm")
        notes = await fault_notes(host, vm)
        zoo.objects = {
            "kvmd": host.kvmd.channel,
            "/dev/kvm": kvm,
            "tdp_fd": tdp,
            "tdp-importer": importer.channel,
            "hmm-mirror": mirror.channel,
            "kvm-fault-notes": notes,
            "iommufdd": host.iommufdd._channel,
            "device_sim": host.device_sim._channel,
            "portal": rig.portal._channel,
            **{name: file._channel for name, file in files.items()},
        }
        zoo.fds = {
            **{name: file._fd for name, file in files.items()},
            "tdp_fd": rig.tdp_fd,
            "/dev/kvm": dev_kvm,
            "tdp-importer": importer.channel._fd,
            "hmm-mirror": mirror.channel._fd,
            "kvm-fault-notes": notes._fd,
            "portal": rig.portal._channel._fd,
        }
        try:
            yield zoo
            assert await host.kvmd.violations() == []
        finally:
            for channel in (tdp, kvm, notes):
                channel.close()  # once more if the test did it already
            importer.close()
            mirror.close()
