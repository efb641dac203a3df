"""What iommufdd holds besides its core: sockets, fds, and what stands for an open file.

An iommufd is one open of /dev/iommu; a VFIO device node is opened by one process.  What an fd's end undoes,
and in which order, the core says (`core/iommufd.py`, `core/vfio.py`).
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from iommufdd.config import IommufddSettings
from iommufdd.core.counts import Counts, UnitCounts
from iommufdd.core.hmm import CallerMm, Invalidate
from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.ioas import Ioas
from iommufdd.core.iommufd import IommufdCtx
from iommufdd.core.platform import Platform
from iommufdd.core.vfio import VfioDeviceFile
from iommufdd.hmm_client import HmmMirror
from iommufdd.memory import TableMemory
from iommufdd.silicon import Silicon
from protocol.errors import PeerError, UapiError
from protocol.kernel.port import StreamSocket
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect, connect_now

log = structlog.get_logger("iommufdd")


@dataclass(slots=True, eq=False)
class IommuFile:
    """One open of /dev/iommu."""

    app: IommufddApp
    ctx: IommufdCtx


@dataclass(slots=True, eq=False)
class VfioFile:
    """One open of a device node; `silicon`: where its BAR is."""

    app: IommufddApp
    silicon: Silicon
    node: VfioDeviceFile


class IommufddApp:
    def __init__(self, loop: Loop, settings: IommufddSettings) -> None:
        self.loop = loop
        self.settings = settings
        self.files = Files(loop)
        self.counts = Counts()
        self.unit_counts = UnitCounts()
        self.tables = TableMemory(loop.kernel, settings.table_bytes)
        self.faults_recorded = 0
        self.iommufds: dict[IommufdCtx, None] = {}  # open, or being released
        self._kept: list[IommufdCtx] = []  # of those, released as far as the unit let us
        self.silicon = self._new_silicon()
        spawn = loop.flows.spawn
        self.platform = Platform(
            self.silicon, self._probe_again, settings.fault_policy, self.unit_counts, spawn, log
        )
        self._closing = False

    async def start(self) -> None:
        """Waits for silicon that is still starting."""
        sock = await connect(self.loop.kernel, self.settings.device)
        self.platform.found(await self.loop.result(self.loop.flows.start(self._probe(sock))))

    def close(self) -> None:
        self._closing = True
        self.files.close()
        self.silicon.close()
        self.tables.close()

    # -- silicon ---------------------------------------------------------------------------------------

    def _new_silicon(self) -> Silicon:
        return Silicon(
            self.loop, self.unit_counts, self._on_page_requests, self._on_faults, self._on_silicon_gone
        )

    async def _probe(self, sock: StreamSocket) -> Silicon:
        silicon = self._new_silicon()
        await silicon.probe(sock)
        self.silicon = silicon
        return silicon

    async def _probe_again(self) -> Silicon:
        """ENODEV: there is nobody."""
        path = self.settings.device
        try:
            silicon = await self._probe(connect_now(self.loop.kernel, path))
        except (OSError, PeerError) as error:
            raise UapiError(errno.ENODEV, f"no remapping unit: {path}: {error}") from None
        self.loop.flows.spawn(self._forget_former())
        return silicon

    async def _forget_former(self) -> None:
        """Once the platform knows the new units.  Those of the link before know each other, so nobody's last
        reference frees them, and a daemon at rest makes too little garbage for Python to look: their fds and
        memory would stay for as long as we run.
        """
        await self.loop.next_turn()
        gc.collect()

    def _on_page_requests(self, unit: IntelIommu, entries: bytes, overflow: bool) -> None:
        iopf = self.platform.iopfs.get(unit)
        if iopf is None:  # its functions may do no DMA yet
            raise PeerError("page requests came before the unit was brought up")
        iopf.prq_event(entries, overflow=overflow)

    def _on_faults(self, records: list[bytes]) -> None:
        self.faults_recorded += len(records)
        log.warning("DMA remapping faults", count=len(records))

    def _on_silicon_gone(self) -> None:
        if not self._closing:
            log.error("the remapping unit is gone, and with it every device: open them again")
        self.platform.gone()
        self._release_kept()

    # -- files -----------------------------------------------------------------------------------------

    def open_iommufd(self, mm_cookie: int) -> IommuFile:
        """For the process of that name."""
        ctx = IommufdCtx(self.platform, self.counts, self._mirror_of, mm_cookie)
        self.iommufds[ctx] = None
        return IommuFile(self, ctx)

    def _mirror_of(self, mm: CallerMm, on_invalidate: Invalidate, on_gone: Callable[[], None]) -> HmmMirror:
        return HmmMirror(self.loop, self.settings.kvmd, mm.fd, on_invalidate, on_gone)

    def iommufd_closed(self, held: IommuFile) -> None:
        held.ctx.close()
        self.loop.flows.spawn(self._release_iommufd(held.ctx))

    async def _release_iommufd(self, ctx: IommufdCtx) -> None:
        try:
            await ctx.release()
        except UapiError as error:
            log.error("an iommufd is kept until the unit is gone, and what it has pinned", why=error.why)
            self._kept.append(ctx)
            if not self.platform.hardware.alive:  # it went meanwhile
                self._release_kept()
        else:
            del self.iommufds[ctx]

    def _release_kept(self) -> None:
        """The unit is gone, and refuses nothing any more."""
        kept, self._kept = self._kept, []
        for ctx in kept:
            self.loop.flows.spawn(self._release_iommufd(ctx))

    def vfio_closed(self, held: VfioFile) -> None:
        self.loop.flows.spawn(self.platform.close(held.node))

    # -- what must hold --------------------------------------------------------------------------------

    @property
    def spaces(self) -> list[Ioas]:
        """The IOASes that have an HWPT."""
        return [ioas for ctx in self.iommufds for ioas in ctx.objects.all(Ioas) if ioas.hwpts]

    def violations(self) -> list[str]:
        """What does not hold, a sentence each."""
        return self.platform.check() + [why for ioas in self.spaces for why in ioas.check()]
