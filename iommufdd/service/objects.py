"""What iommufdd holds: the silicon, open files, HWPTs by domain id, devices by unit and requester id.

An iommufd is one open of /dev/iommu with its own objects; a VFIO device node is opened by one process,
bound to an iommufd, attached to one of its HWPTs.  Closing an fd undoes what was done through it, in
the safe order.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

import structlog

from iommufdd.config import IommufddSettings
from iommufdd.core.counts import Counts, UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.group import IommufdGroup
from iommufdd.core.hardware import FunctionInfo, Unit
from iommufdd.core.hmm import ProcessMemory
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas import Ioas
from iommufdd.core.iopf import Iopf
from iommufdd.core.object import Objects
from iommufdd.core.source import Sources
from iommufdd.kvm_client import FaultNotes
from iommufdd.memory import TableMemory
from iommufdd.silicon import RemoteUnit, Silicon
from protocol.errors import PeerError, UapiError
from protocol.flow import RwLock
from protocol.hw.faults import FAULT_RECORD_SIZE
from protocol.hw.pasid_entry import FIRST_SS_DID
from protocol.hw.prq import PAGE_REQUEST_SIZE
from protocol.hw.qi import ResponseCode
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect, connect_now

log = structlog.get_logger("iommufdd")


@dataclass(slots=True, eq=False)
class IommuFile:
    """One open of /dev/iommu; `mm` names the process that opened it, `account` whose limit pins count
    against: "user" or "mm" (IOMMU_OPTION_RLIMIT_MODE)."""

    app: App
    mm: int
    sources: Sources
    account: str = "user"
    objects: Objects = field(default_factory=Objects)
    closed: bool = False


@dataclass(slots=True, eq=False)
class VfioFile:
    """One open of a device node, of the silicon that was there then."""

    app: App
    silicon: Silicon
    group: IommufdGroup
    info: FunctionInfo
    unit: RemoteUnit
    bound: tuple[IommuFile, IommufdDevice] | None = None

    def check(self) -> None:
        """ENODEV: the device is gone, whatever came in its place."""
        if not self.silicon.alive:
            why = f"{self.info.name} went with its remapping unit: close its node and open it again"
            raise UapiError(errno.ENODEV, why)


class App:
    def __init__(self, loop: Loop, settings: IommufddSettings) -> None:
        self.loop = loop
        self.settings = settings
        self.files = Files(loop)
        self.unit_counts = UnitCounts()
        self.silicon = self._new_silicon()
        self.tables = TableMemory(settings.table_bytes)
        self.counts = Counts()
        self.following: dict[Ioas, FaultNotes] = {}
        self.iopfs: dict[Unit, Iopf] = {}
        self.groups: dict[int, IommufdGroup] = {}
        self.hwpts: dict[int, Hwpt] = {}  # by domain id
        self.iommufds: dict[IommuFile, None] = {}  # open, or being released
        self.opened: dict[tuple[Unit, int], VfioFile] = {}  # by unit and requester id
        self.faults_recorded = 0
        self._probing = RwLock()
        self._closing = False

    async def start(self) -> None:
        """Waits for silicon that is still starting."""
        sock = await connect(self.settings.device)
        await self.loop.result(self.loop.flows.start(self._take(sock)))

    def close(self) -> None:
        self._closing = True
        self.files.close()
        self.tables.close()

    @property
    def devices(self) -> list[IommufdDevice]:
        """Those that are bound."""
        return [held.bound[1] for held in self.opened.values() if held.bound is not None]

    # -- silicon ---------------------------------------------------------------------------------------

    def _new_silicon(self) -> Silicon:
        return Silicon(
            self.loop, self.unit_counts, self.on_page_requests, self._on_faults, self._on_silicon_gone
        )

    async def _take(self, sock: socket.socket) -> None:
        silicon = self._new_silicon()
        await silicon.probe(sock)
        self.silicon = silicon
        self.iopfs = {unit: self._iopf(unit) for unit in silicon.units}
        self.groups = {info.group: IommufdGroup(info.group) for info, _ in silicon.functions}

    async def live_silicon(self) -> Silicon:
        """The silicon, probed again if its link was lost.  ENODEV: none is there; EBUSY: another has it."""
        async with self._probing:
            if not self.silicon.alive:
                await self._probe_again()
            return self.silicon

    async def _probe_again(self) -> None:
        path = self.settings.device
        try:
            await self._take(connect_now(path))
        except (OSError, PeerError) as error:
            raise UapiError(errno.ENODEV, f"no remapping unit: {path}: {error}") from None
        log.info("the remapping unit is there again", units=len(self.silicon.units))

    def silicon_of(self, device: IommufdDevice) -> Silicon:
        """ENODEV: it went with its unit."""
        if not self.silicon.alive or device.unit not in self.silicon.units:
            raise UapiError(errno.ENODEV, f"{device.info.name} went with its remapping unit")
        return self.silicon

    # -- interrupts ------------------------------------------------------------------------------------

    def _iopf(self, unit: RemoteUnit) -> Iopf:
        def find(rid: int) -> IommufdDevice | None:
            held = self.opened.get((unit, rid))
            return None if held is None or held.bound is None else held.bound[1]

        def respond(rid: int, prgi: int, code: ResponseCode) -> bool:
            sent = unit.respond(rid, prgi, code)
            if not sent:
                log.warning("page group response lost: no silicon", rid=rid, prgi=prgi, code=code.name)
            return sent

        return Iopf(find, respond, self.loop.flows.spawn, self.unit_counts)

    def on_page_requests(self, unit: RemoteUnit, entries: bytes, overflow: bool) -> None:
        """The page request interrupt of one unit [RFC 23/42]: take every entry, move the head."""
        iopf = self.iopfs[unit]
        count = len(entries) // PAGE_REQUEST_SIZE
        malformed = self.unit_counts.malformed
        for n in range(count):
            iopf.take(entries[n * PAGE_REQUEST_SIZE : (n + 1) * PAGE_REQUEST_SIZE])
        if malformed < self.unit_counts.malformed:
            new = self.unit_counts.malformed - malformed
            log.warning("malformed page requests", count=new, unit=unit.number)
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
            log.error("the remapping unit is gone, and with it every device: open them again")
        for iopf in self.iopfs.values():
            iopf.partial.discard()

    def violations(self) -> list[str]:
        """What does not hold, a sentence each."""
        on = {
            unit: {d.rid: d.hwpt for d in self.devices if d.unit is unit and d.hwpt is not None}
            for unit in self.iopfs
        }
        partial = [why for unit, iopf in self.iopfs.items() for why in iopf.partial.check(on[unit])]
        return partial + [why for ioas in self.spaces for why in ioas.check()]

    @property
    def spaces(self) -> list[Ioas]:
        """The IOASes that have an HWPT."""
        return [ioas for held in self.iommufds for ioas in held.objects.all(Ioas) if ioas.hwpts]

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

    async def lose_host(self, held: IommuFile, host: ProcessMemory) -> None:
        """kvmd is gone, and whose memory the tables lead to with it."""
        using = [
            ioas for ioas in held.objects.all(Ioas) if any(source.host is host for source in ioas.sources)
        ]
        for ioas in using:
            for hwpt in list(ioas.hwpts):
                await self.lose_kvm(hwpt)
            await ioas.lose_host()
        for ioas in using:
            await ioas.lose_windows()

    async def lose_kvm(self, hwpt: Hwpt) -> None:
        """kvmd is gone: nobody maintains the table any more, so nobody may walk it (R28)."""
        hwpt.maintained = False
        log.error("KVM is gone: its devices are detached", hwpt=hwpt.id, functions=len(hwpt.attached))
        for held in list(self.opened.values()):
            if held.bound is not None and held.bound[1].hwpt is hwpt:
                await held.group.detach(held.bound[1])

    # -- devices ---------------------------------------------------------------------------------------

    async def unbind(self, held: VfioFile) -> None:
        """Returns once it is done, by us or by whoever began before."""
        if held.bound is None:
            return
        iommufd, device = held.bound
        await held.group.unbind(device)
        if held.bound is not None:
            held.bound = None
            iommufd.objects.remove(device.id)

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
        del self.iommufds[held]

    def vfio_closed(self, held: VfioFile) -> None:
        self.loop.flows.spawn(self._release_vfio(held))

    async def _release_vfio(self, held: VfioFile) -> None:
        await self.unbind(held)
        del self.opened[held.unit, held.info.rid]
