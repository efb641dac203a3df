"""One open of /dev/iommu: its objects, whose memory its IOASes map, and the order in which all of it ends.

Models struct iommufd_ctx and iommufd_fops_release [iommufd main.c].  At the end devices go first, for they
reach through the rest; then HWPTs, which the units must forget; then IOASes, whose pages the tables of those
led to. If KVM goes before, nobody maintains what its memory is mapped by: devices are detached, the tables
emptied, and only when that is done for every IOAS that maps the process are its windows given back (R28).
"""

from __future__ import annotations

import errno

from iommufdd.core.connect import Connector, MirrorOf
from iommufdd.core.counts import Counts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.hmm import CallerMm, ProcessMemory
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.object import Object, Objects
from iommufdd.core.platform import Platform
from iommufdd.core.source import Sources
from protocol.errors import UapiError


class IommufdCtx:
    """`mm_cookie` names the process that opened it."""

    def __init__(self, platform: Platform, counts: Counts, mirror_of: MirrorOf, mm_cookie: int) -> None:
        self.platform = platform
        self.mm_cookie = mm_cookie
        self.objects = Objects()
        self.connector = Connector(platform.live, mirror_of, self._lost)
        self.sources = Sources(self.connector)
        self._counts = counts
        self._closed = False
        self._kept: list[Object] = []  # gone, and a unit refused to forget them

    def check_open(self) -> None:
        """EBADF: it was closed while we slept."""
        if self._closed:
            raise UapiError(errno.EBADF, "the iommufd was closed meanwhile")

    # -- objects ---------------------------------------------------------------------------------------

    def ioas_alloc(self, *, on_demand: bool) -> int:
        """The id of an empty one.  ENOMEM."""
        if on_demand:
            return self.objects.add(IoasOnDemand(self._counts, Sources(self.connector)))
        return self.objects.add(Ioas(self._counts, self.sources))

    async def destroy(self, number: int) -> None:
        """ENOENT; EBUSY: a bound device, or something that is in use; else it is gone for whoever asks.  Any
        other UapiError: a unit refuses to forget it, so that what it is made of is kept until the end.
        """
        found = self.objects.get(number, Object)
        if isinstance(found, IommufdDevice):
            raise UapiError(errno.EBUSY, f"device {found.id} is bound: close its VFIO device instead")
        self.objects.remove(number)
        await self._end(found)

    async def change_process(self, mm: CallerMm) -> None:
        """That process pays for all pins from now on.  EINVAL: memory of a process is mapped; ENOMEM."""
        for ioas in self.objects.all(IoasOnDemand):
            if any(ioas.areas):
                raise UapiError(
                    errno.EINVAL, f"IOAS {ioas.id} maps memory of a process: it cannot be taken over"
                )
        await self.sources.change_process(mm)

    async def _end(self, gone: Object) -> None:
        try:
            if isinstance(gone, Hwpt):
                # await: gone: cannot change: the caller took it out of the table
                await self.platform.destroy_hwpt(gone)
            elif isinstance(gone, Ioas):
                # await: gone: cannot change: the same
                await gone.destroy()
        except UapiError:
            self._kept.append(gone)
            raise

    # -- the end ---------------------------------------------------------------------------------------

    def _lost(self, host: ProcessMemory) -> None:
        self.platform.spawn(self._lose(host))

    async def _lose(self, host: ProcessMemory) -> None:
        """kvmd is gone, and whose memory the tables lead to with it.  Nothing more is shown of it by now
        (`Pages.check_there`), so that these are all that show any.
        """
        using = [ioas for ioas in self.objects.all(Ioas) if ioas.maps(host)]
        lost = dict.fromkeys(source for ioas in using for source in ioas.sources if source.host is host)
        for ioas in using:
            for hwpt in list(ioas.hwpts):
                # await: lost, each ioas, each hwpt, ioas: cannot change: our own lists; one that is
                # destroyed meanwhile has nothing attached and nothing mapped
                await self.platform.lose_kvm(hwpt)
            # await: lost, each ioas: cannot change: the same
            await ioas.lose_host()
        for source in lost:
            # await: each source: cannot change: our own, in the order they came
            await source.lose_windows()

    def close(self) -> None:
        """The last fd of it is closed: from now on nothing is made of it."""
        self._closed = True

    async def release(self) -> None:
        """All there is goes.  UapiError: a unit refuses to forget some of it, which is kept; all the rest is
        gone.  Again when the unit is.
        """
        for node in list(self.platform.opened.values()):
            if node.binding is not None and node.binding.objects is self.objects:
                # await: each node: it may be unbound; asked again: `unbind`
                # (tests/unit/iommufdd/test_vfio.py::test_two_who_unbind_take_the_device_out_once)
                await node.unbind()
        kept, self._kept = self._kept, []
        there = [*self.objects.all(Hwpt), *self.objects.all(Ioas)]
        for each in there:
            self.objects.drop(each.id)
        refused: UapiError | None = None
        for each in [*kept, *there]:
            try:
                # await: each each, refused: cannot change: dropped, so that nobody else finds it
                await self._end(each)
            except UapiError as error:
                refused = error
        if refused is not None:
            raise refused
