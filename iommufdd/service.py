"""iommufdd's objects as files: /dev/iommu, VFIO devices, and the faults in between.

An iommufd is one open of /dev/iommu with its own objects; a VFIO device node is opened by one process,
bound to an iommufd, attached to one of its HWPTs.  Closing an fd undoes what was done through it, in
the safe order.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import structlog

from iommufdd.config import Settings
from iommufdd.core import iopf
from iommufdd.core.device import Device
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.iopf import Groups, Verdict
from iommufdd.core.kvm_domain import KvmDomain, check_metadata, what_is_missing
from iommufdd.core.object import Objects
from iommufdd.kvm_client import KvmTdp
from iommufdd.silicon import Silicon
from protocol.errors import UapiError
from protocol.hw.faults import FAULT_RECORD_SIZE
from protocol.hw.fields import FormatError
from protocol.hw.pasid_entry import FIRST_SS_DID
from protocol.hw.prq import PAGE_REQUEST_SIZE, PageRequest
from protocol.hw.qi import ResponseCode
from protocol.rpc.channel import Body, Fds
from protocol.rpc.door import Door
from protocol.rpc.files import Files, inode_of
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import iommufd as uapi
from protocol.uapi import names

log = structlog.get_logger("iommufdd")

INT_MAX = (1 << 31) - 1
VTD_HW_INFO = 1


@dataclass(slots=True, eq=False)
class IommuFile:
    """One open of /dev/iommu; `mm` names the process that opened it."""

    app: Iommufdd
    mm: int
    objects: Objects = field(default_factory=Objects)
    closed: bool = False


@dataclass(slots=True, eq=False)
class VfioFile:
    """One open of a device node."""

    app: Iommufdd
    rid: int
    name: str
    bound: tuple[IommuFile, Device] | None = None


class Iommufdd:
    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.settings = settings
        self.files = Files(loop)
        self.silicon = Silicon(loop, self._on_page_requests, self._on_faults, self._on_silicon_gone)
        self.bound: dict[int, Device] = {}  # by requester id
        self.hwpts: dict[int, HwptKvm] = {}  # by domain id
        self.groups = Groups()
        self.opened: dict[int, VfioFile] = {}
        self.page_requests = 0
        self.responses = 0
        self.faults_recorded = 0
        self.door = Door(loop, FRONT_DOOR, self)
        self._closing = False

    async def start(self) -> None:
        await self.silicon.probe(self.settings.device)

    def close(self) -> None:
        self._closing = True
        self.door.close()
        self.files.close()

    # -- interrupts ------------------------------------------------------------------------------------

    def _on_page_requests(self, entries: bytes, overflow: bool) -> None:
        """The PRQ thread [RFC 23/42]: judge each entry, gather groups, hand whole ones on, move the head."""
        count = len(entries) // PAGE_REQUEST_SIZE
        self.page_requests += count
        for n in range(count):
            self._on_page_request(entries[n * PAGE_REQUEST_SIZE : (n + 1) * PAGE_REQUEST_SIZE])
        if overflow:
            log.warning("page request queue overflowed: partial groups are discarded", held=self.groups.held)
            self.groups.discard()
        self.silicon.consumed(count, clear_overflow=overflow)

    def _on_page_request(self, raw: bytes) -> None:
        try:
            request = PageRequest.from_bytes(raw)
        except FormatError as error:
            log.warning("malformed page request", why=str(error))
            return
        verdict = iopf.judge(request)
        if verdict is Verdict.SKIP:
            return
        if verdict is Verdict.REFUSE and not request.last:
            return  # dropped; its group goes on without it
        group = self.groups.gather(request)
        device = self.bound.get(request.rid)
        if verdict is Verdict.REFUSE or device is None or device.hwpt is None:
            if group is not None:
                self._respond(request, ResponseCode.INVALID)
        elif group is not None:
            self.loop.flows.spawn(self._handle_group(device, device.hwpt, group))

    async def _handle_group(self, device: Device, hwpt: HwptKvm, group: list[PageRequest]) -> None:
        """In order, until one fails; then the one response [RFC 15/42]."""
        device.begin_group()
        code = ResponseCode.SUCCESS
        for request in group:
            code = await hwpt.fault(request)
            if code is not ResponseCode.SUCCESS:
                break
        self._respond(group[-1], code)
        device.end_group()

    def _respond(self, last: PageRequest, code: ResponseCode) -> None:
        self.responses += 1
        self.silicon.respond(last.rid, last.prgi, code)

    def _on_faults(self, records: bytes) -> None:
        self.faults_recorded += (count := len(records) // FAULT_RECORD_SIZE)
        log.warning("DMA remapping faults", count=count)

    def _on_silicon_gone(self) -> None:
        if not self._closing:
            log.error("the remapping unit is gone: devices cannot be used any more")
        self.groups.discard()

    # -- domains ---------------------------------------------------------------------------------------

    def new_did(self) -> int:
        did = next((d for d in range(FIRST_SS_DID, self.silicon.cap.domain_ids) if d not in self.hwpts), None)
        if did is None:
            raise UapiError(errno.ENOSPC, f"all {self.silicon.cap.domain_ids} domain ids are in use")
        return did

    async def destroy_hwpt(self, hwpt: HwptKvm) -> None:
        await hwpt.destroy()
        del self.hwpts[hwpt.domain.did]

    async def lose_kvm(self, hwpt: HwptKvm) -> None:
        """kvmd is gone: nobody maintains the table any more, so nobody may walk it (R28)."""
        log.error("KVM is gone: its devices are detached", hwpt=hwpt.id, functions=len(hwpt.rids))
        for rid in list(hwpt.rids):
            device = self.bound.get(rid)  # unless it was unbound while we waited for another
            if device is not None:
                await device.detach()

    # -- the end of files ------------------------------------------------------------------------------

    def iommufd_closed(self, held: IommuFile) -> None:
        held.closed = True
        self.loop.flows.spawn(self._release_iommufd(held))

    async def _release_iommufd(self, held: IommuFile) -> None:
        for vfio in list(self.opened.values()):
            if vfio.bound is not None and vfio.bound[0] is held:
                await self.unbind(vfio)
        for hwpt in held.objects.all(HwptKvm):
            held.objects.remove(hwpt.id)
            await self.destroy_hwpt(hwpt)

    def vfio_closed(self, held: VfioFile) -> None:
        self.loop.flows.spawn(self._release_vfio(held))

    async def _release_vfio(self, held: VfioFile) -> None:
        await self.unbind(held)
        del self.opened[held.rid]

    async def unbind(self, held: VfioFile) -> None:
        """Returns once it is done, by us or by whoever began before."""
        if held.bound is None:
            return
        iommufd, device = held.bound
        await device.detach()
        if held.bound is not None:
            held.bound = None
            self.groups.discard([device.rid])
            iommufd.objects.remove(device.id)
            del self.bound[device.rid]


# -- front door ----------------------------------------------------------------------------------------


def _open(app: Iommufdd, message: uapi.Open, fds: Fds) -> Answer:
    if message.path == names.IOMMU_PATH:
        mm = inode_of(fds.peek(0)) if len(fds) else 0
        fd, _, _ = app.files.open(IOMMUFD, IommuFile(app, mm), app.iommufd_closed)
        return Answer({}, [fd])
    number = message.path.removeprefix(names.VFIO_PATH)
    if not (message.path.startswith(names.VFIO_PATH) and number.isdecimal() and len(number) < 4):
        raise UapiError(
            errno.ENOENT, f"open {message.path!r}: only {names.IOMMU_PATH} and {names.VFIO_PATH}N"
        )
    if int(number) >= len(app.silicon.functions):
        raise UapiError(
            errno.ENOENT, f"open {message.path!r}: there are {len(app.silicon.functions)} devices"
        )
    rid, name = app.silicon.functions[int(number)]
    if rid in app.opened:
        raise UapiError(errno.EBUSY, f"{message.path} is open already")
    held = app.opened[rid] = VfioFile(app, rid, name)
    fd, _, _ = app.files.open(VFIO, held, app.vfio_closed)
    return Answer({}, [fd])


def _stats(app: Iommufdd, message: uapi.Stats, fds: Fds) -> Body:
    return {
        "page_requests": app.page_requests,
        "responses": app.responses,
        "partial_held": app.groups.held,
        "partial_discarded": app.groups.discarded,
        "faults_recorded": app.faults_recorded,
        "devices_bound": len(app.bound),
        "hwpts": [
            {
                "did": hwpt.domain.did,
                "functions": len(hwpt.rids),
                "invalidations": hwpt.invalidations,
                "acked_epoch": hwpt.acked_epoch,
                "faults": {code.name: count for code, count in hwpt.faults.items()},
            }
            for hwpt in app.hwpts.values()
        ],
    }


FRONT_DOOR: Service[Iommufdd] = Service(
    "iommufdd", {"OPEN": Method(uapi.Open, _open, 1), "STATS": Method(uapi.Stats, _stats)}
)

# -- /dev/iommu ----------------------------------------------------------------------------------------


async def _hwpt_alloc(held: IommuFile, message: uapi.IommuHwptAlloc, fds: Fds) -> Body:
    """The series' checks in their order [RFC 12/42], [RFC 14/42], [RFC 18/42]."""
    if message.size < names.HWPT_ALLOC_MIN_SIZE:
        raise UapiError(errno.EINVAL, f"struct of {message.size} bytes: at least {names.HWPT_ALLOC_MIN_SIZE}")
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, "__reserved is not zero")
    if message.data_type == names.IOMMU_HWPT_DATA_NONE and message.data_len:
        raise UapiError(errno.EINVAL, f"data_type NONE with {message.data_len} bytes of data")
    held.objects.get(message.dev_id, Device)
    if message.data_type != names.IOMMU_HWPT_DATA_KVM:
        raise UapiError(
            errno.EOPNOTSUPP, f"data_type {message.data_type}: only {names.IOMMU_HWPT_DATA_KVM} (KVM)"
        )
    tdp_fd = _tdp_fd_of(message, fds)
    app = held.app
    hwpt: HwptKvm | None = None

    def gone() -> None:
        if hwpt is not None:
            app.loop.flows.spawn(app.lose_kvm(hwpt))

    tdp = KvmTdp(held.mm, tdp_fd, gone)
    try:
        hwpt = await _import_tdp(app, tdp, message.flags)
        if held.closed:
            raise UapiError(errno.EBADF, "the iommufd was closed meanwhile")
        return {"out_hwpt_id": held.objects.add(hwpt)}
    except UapiError:
        if hwpt is not None:
            await app.destroy_hwpt(hwpt)
        else:
            tdp.release()
        raise


def _tdp_fd_of(message: uapi.IommuHwptAlloc, fds: Fds) -> int:
    """The TDP FD that struct iommu_hwpt_kvm_info names; it becomes ours."""
    if message.data_len != names.HWPT_KVM_INFO_SIZE or message.data_uptr is None:
        raise UapiError(
            errno.EINVAL, f"data_len {message.data_len}: {names.HWPT_KVM_INFO_SIZE} bytes at data_uptr"
        )
    if len(message.data_uptr) < message.data_len:
        raise UapiError(errno.EFAULT, "data_uptr cannot be read")
    number = int.from_bytes(message.data_uptr[: message.data_len], "little")
    if number > INT_MAX:
        raise UapiError(errno.EINVAL, f"fd {number:#x} is no fd number")
    if number not in message.fd_table:
        raise UapiError(errno.EBADF, f"fd {number} is not open")
    return fds.take(message.fd_table.index(number))


async def _import_tdp(app: Iommufdd, tdp: KvmTdp, flags: int) -> HwptKvm:
    await tdp.open(app.loop, app.settings.kvmd)
    meta = await tdp.metadata()
    if not app.silicon.alive:
        raise UapiError(errno.ENODEV, "the remapping unit is gone")
    check_metadata(meta, flags)
    missing = what_is_missing(meta, app.silicon.cap, app.silicon.ecap)
    if missing is not None:
        raise UapiError(errno.EOPNOTSUPP, f"the remapping unit cannot walk this TDP: {missing}")
    did = app.new_did()
    domain = KvmDomain(meta.root_hpa, meta.level, did)
    hwpt = app.hwpts[did] = HwptKvm(domain, app.silicon.cap, tdp, app.silicon)
    tdp.on_invalidate = hwpt.invalidate
    try:
        windows, fds = await tdp.register()
        hwpt.memory = await app.silicon.add_memory(windows, [fds.take(n) for n in range(len(fds))])
    except UapiError:
        del app.hwpts[did]
        raise
    return hwpt


async def _destroy(held: IommuFile, message: uapi.IommuDestroy, fds: Fds) -> Body:
    held.objects.get(message.id, HwptKvm)
    hwpt = held.objects.remove(message.id)
    assert isinstance(hwpt, HwptKvm)
    await held.app.destroy_hwpt(hwpt)
    return {}


def _get_hw_info(held: IommuFile, message: uapi.IommuGetHwInfo, fds: Fds) -> Body:
    held.objects.get(message.dev_id, Device)
    silicon = held.app.silicon
    return {"out_data_type": VTD_HW_INFO, "cap_reg": silicon.cap.value, "ecap_reg": silicon.ecap.value}


IOMMUFD: Service[IommuFile] = Service(
    "iommufd",
    {
        "IOMMU_HWPT_ALLOC": Method(uapi.IommuHwptAlloc, _hwpt_alloc, 1),
        "IOMMU_DESTROY": Method(uapi.IommuDestroy, _destroy),
        "IOMMU_GET_HW_INFO": Method(uapi.IommuGetHwInfo, _get_hw_info),
    },
)

# -- VFIO devices --------------------------------------------------------------------------------------


def _bind(held: VfioFile, message: uapi.VfioDeviceBindIommufd, fds: Fds) -> Body:
    if message.flags or held.bound is not None:
        raise UapiError(errno.EINVAL, f"{held.name}: flags must be 0 and the device not bound yet")
    if not len(fds):
        raise UapiError(errno.EBADF, "no iommufd came with the request")
    try:
        iommufd = held.app.files.find(fds.peek(0), IommuFile)
    except UapiError:
        raise UapiError(errno.EBADFD, "the file descriptor is no iommufd") from None
    device = Device(held.rid, held.name, held.app.silicon, held.app.silicon.ecap)
    device_id = iommufd.objects.add(device)
    held.bound = iommufd, device
    held.app.bound[held.rid] = device
    return {"out_devid": device_id}


async def _attach(held: VfioFile, message: uapi.VfioDeviceAttachIommufdPt, fds: Fds) -> Body:
    iommufd, device = _bound(held, message.flags)
    hwpt = iommufd.objects.get(message.pt_id, HwptKvm)
    await device.attach(hwpt)
    return {"pt_id": hwpt.id}


async def _detach(held: VfioFile, message: uapi.VfioDeviceDetachIommufdPt, fds: Fds) -> Body:
    _, device = _bound(held, message.flags)
    await device.detach()
    held.app.groups.discard([device.rid])
    return {}


async def _mmap(held: VfioFile, message: uapi.VfioDeviceMmap, fds: Fds) -> Answer:
    _bound(held, 0)
    return Answer({}, [await held.app.silicon.portal(held.rid)])


def _bound(held: VfioFile, flags: int) -> tuple[IommuFile, Device]:
    if flags or held.bound is None:
        raise UapiError(errno.EINVAL, f"{held.name}: flags must be 0 and the device bound to an iommufd")
    return held.bound


VFIO: Service[VfioFile] = Service(
    "vfio-device",
    {
        "VFIO_DEVICE_BIND_IOMMUFD": Method(uapi.VfioDeviceBindIommufd, _bind, 1),
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT": Method(uapi.VfioDeviceAttachIommufdPt, _attach),
        "VFIO_DEVICE_DETACH_IOMMUFD_PT": Method(uapi.VfioDeviceDetachIommufdPt, _detach),
        "VFIO_DEVICE_MMAP": Method(uapi.VfioDeviceMmap, _mmap),
    },
)
