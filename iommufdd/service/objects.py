"""What iommufdd holds: the silicon, open files, HWPTs by domain id, devices by requester id.

An iommufd is one open of /dev/iommu with its own objects; a VFIO device node is opened by one process,
bound to an iommufd, attached to one of its HWPTs.  Closing an fd undoes what was done through it, in
the safe order.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import structlog

from iommufdd.config import Settings
from iommufdd.core.counts import Counts
from iommufdd.core.device import Device
from iommufdd.core.group import Group
from iommufdd.core.hardware import FunctionInfo, Unit
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas import Ioas
from iommufdd.core.iopf import Iopf
from iommufdd.core.object import Objects
from iommufdd.kvm_client import FaultNotes
from iommufdd.memory import TableMemory
from iommufdd.silicon import RemoteUnit, Silicon
from protocol.errors import UapiError
from protocol.hw.faults import FAULT_RECORD_SIZE
from protocol.hw.pasid_entry import FIRST_SS_DID
from protocol.hw.prq import PAGE_REQUEST_SIZE
from protocol.hw.qi import ResponseCode
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop

log = structlog.get_logger("iommufdd")


@dataclass(slots=True, eq=False)
class IommuFile:
    """One open of /dev/iommu; `mm` names the process that opened it, `account` whose limit pins count
    against: "user" or "mm" (IOMMU_OPTION_RLIMIT_MODE)."""

    app: App
    mm: int
    account: str = "user"
    objects: Objects = field(default_factory=Objects)
    closed: bool = False


@dataclass(slots=True, eq=False)
class VfioFile:
    """One open of a device node."""

    app: App
    info: FunctionInfo
    unit: RemoteUnit
    bound: tuple[IommuFile, Device] | None = None


class App:
    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.settings = settings
        self.files = Files(loop)
        self.silicon = Silicon(loop, self.on_page_requests, self._on_faults, self._on_silicon_gone)
        self.tables = TableMemory(settings.table_bytes)
        self.counts = Counts()
        self.following: dict[Ioas, FaultNotes] = {}
        self.iopfs: dict[Unit, Iopf] = {}
        self.groups: dict[int, Group] = {}
        self.bound: dict[int, Device] = {}  # by requester id
        self.hwpts: dict[int, Hwpt] = {}  # by domain id
        self.opened: dict[int, VfioFile] = {}
        self.faults_recorded = 0
        self._closing = False

    async def start(self) -> None:
        await self.silicon.probe(self.settings.device)
        self.iopfs = {unit: self._iopf(unit) for unit in self.silicon.units}
        self.groups = {info.group: Group(info.group) for info, _ in self.silicon.functions}

    def close(self) -> None:
        self._closing = True
        self.files.close()
        self.tables.close()

    # -- interrupts ------------------------------------------------------------------------------------

    def _iopf(self, unit: RemoteUnit) -> Iopf:
        def find(rid: int) -> Device | None:
            device = self.bound.get(rid)
            return device if device is not None and device.unit is unit else None

        def respond(rid: int, prgi: int, code: ResponseCode) -> bool:
            sent = unit.respond(rid, prgi, code)
            if not sent:
                log.warning("page group response lost: no silicon", rid=rid, prgi=prgi, code=code.name)
            return sent

        return Iopf(find, respond, self.loop.flows.spawn)

    def on_page_requests(self, unit: RemoteUnit, entries: bytes, overflow: bool) -> None:
        """The page request interrupt of one unit [RFC 23/42]: take every entry, move the head."""
        iopf = self.iopfs[unit]
        count = len(entries) // PAGE_REQUEST_SIZE
        malformed = iopf.malformed
        for n in range(count):
            iopf.take(entries[n * PAGE_REQUEST_SIZE : (n + 1) * PAGE_REQUEST_SIZE])
        if iopf.malformed > malformed:
            log.warning("malformed page requests", count=iopf.malformed - malformed, unit=unit.number)
        if overflow:
            held = iopf.partial.held
            log.warning("page request queue overflowed: partial groups are discarded", held=held)
            iopf.partial.discard()
        unit.consumed(count, clear_overflow=overflow)

    def _on_faults(self, records: bytes) -> None:
        self.faults_recorded += (count := len(records) // FAULT_RECORD_SIZE)
        log.warning("DMA remapping faults", count=count)

    def _on_silicon_gone(self) -> None:
        if not self._closing:
            log.error("the remapping unit is gone: devices cannot be used any more")
        for iopf in self.iopfs.values():
            iopf.partial.discard()

    def violations(self) -> list[str]:
        """What does not hold, a sentence each."""
        on = {rid: device.hwpt for rid, device in self.bound.items() if device.hwpt is not None}
        return [why for iopf in self.iopfs.values() for why in iopf.partial.check(on)]

    # -- domains ---------------------------------------------------------------------------------------

    def new_did(self) -> int:
        """A domain id that is free behind every unit.  ENOSPC."""
        ids = self.silicon.domain_ids
        did = next((d for d in range(FIRST_SS_DID, ids) if d not in self.hwpts), None)
        if did is None:
            raise UapiError(errno.ENOSPC, f"all {ids} domain ids are in use")
        return did

    async def destroy_hwpt(self, hwpt: Hwpt) -> None:
        await hwpt.destroy()
        del self.hwpts[hwpt.domain.did]

    async def destroy_ioas(self, ioas: Ioas) -> None:
        following = self.following.pop(ioas, None)
        if following is not None:
            following.hang_up()
        await ioas.destroy()

    async def lose_host(self, ioas: Ioas) -> None:
        """kvmd is gone, and whose memory the tables lead to with it."""
        for hwpt in list(ioas.hwpts):
            await self.lose_kvm(hwpt)
        await ioas.lose_host()

    async def lose_kvm(self, hwpt: Hwpt) -> None:
        """kvmd is gone: nobody maintains the table any more, so nobody may walk it (R28)."""
        log.error("KVM is gone: its devices are detached", hwpt=hwpt.id, functions=len(hwpt.attached))
        for rid in hwpt.rids:
            device = self.bound.get(rid)  # unless it was unbound while we waited for another
            if device is not None:
                await self.detach(device)

    # -- devices ---------------------------------------------------------------------------------------

    def group_of(self, device: Device) -> Group:
        return self.groups[device.info.group]

    async def detach(self, device: Device) -> None:
        await self.group_of(device).detach(device)

    async def unbind(self, held: VfioFile) -> None:
        """Returns once it is done, by us or by whoever began before."""
        if held.bound is None:
            return
        iommufd, device = held.bound
        await self.detach(device)
        if held.bound is not None:
            held.bound = None
            self.group_of(device).release(device)
            iommufd.objects.remove(device.id)
            del self.bound[device.rid]

    # -- the end of files ------------------------------------------------------------------------------

    def iommufd_closed(self, held: IommuFile) -> None:
        held.closed = True
        self.loop.flows.spawn(self._release_iommufd(held))

    async def _release_iommufd(self, held: IommuFile) -> None:
        for vfio in list(self.opened.values()):
            if vfio.bound is not None and vfio.bound[0] is held:
                await self.unbind(vfio)
        for hwpt in held.objects.all(Hwpt):
            held.objects.drop(hwpt.id)
            await self.destroy_hwpt(hwpt)
        for ioas in held.objects.all(Ioas):
            held.objects.drop(ioas.id)
            await self.destroy_ioas(ioas)

    def vfio_closed(self, held: VfioFile) -> None:
        self.loop.flows.spawn(self._release_vfio(held))

    async def _release_vfio(self, held: VfioFile) -> None:
        await self.unbind(held)
        del self.opened[held.info.rid]
