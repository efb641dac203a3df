"""One client of one function: what each message does, and what is answered
[vfio-user Protocol Specification].

Messages are handled one after the other, as they came; the answer to one goes out before the next is looked
at.  The first is VERSION, and what a client gets wrong afterwards is an error reply with an errno and changes
nothing.  Must hold:
  - a message that wants a reply gets one, a posted one gets none;
  - the function is never asked for what lies outside its regions, interrupts or windows;
  - an fd that came is a window's, an interrupt's, or closed when the message is answered;
  - when the session has ended no window is mapped, no event is set, and no fd is open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import EINVAL, EOPNOTSUPP
from typing import ClassVar, Final, NamedTuple, Protocol

from protocol.errors import PeerError, UapiError
from vfio_user.core import records
from vfio_user.core.dma_table import DmaTable, check_window
from vfio_user.core.function import PCI_IRQS, PCI_REGIONS, DmaWindow, IrqEvent, PciFunction, PciRegion
from vfio_user.core.irqs import Irqs
from vfio_user.core.limits import MAX_DATA_XFER_BYTES
from vfio_user.core.records import (
    DeviceFlags,
    DmaMap,
    DmaUnmap,
    IrqFlags,
    IrqSet,
    RegionAccess,
    RegionFlags,
    RegionQuery,
)
from vfio_user.core.stream import ClientCommand, ClientMessage, reply_to
from vfio_user.core.version import negotiate

# What the protocol has and this server does not: everything there is to see of a region goes by messages or
# its file, and no state of a function can be moved.
NOT_OFFERED: Final = frozenset(
    {
        ClientCommand.DEVICE_GET_REGION_IO_FDS,
        ClientCommand.DIRTY_PAGES,
        ClientCommand.DEVICE_FEATURE,
        ClientCommand.MIG_DATA_READ,
        ClientCommand.MIG_DATA_WRITE,
    }
)


class MessageAnswer(NamedTuple):
    """The bytes to send, and fds to send along, which stay the function's."""

    data: bytes
    fds: tuple[int, ...] = ()


class ClientFds(Protocol):
    """What can be done with an fd that came."""

    def close(self, fd: int) -> None: ...

    def event_of(self, fd: int) -> IrqEvent:
        """It owns the fd.  UapiError, with the fd left alone: it is no eventfd."""


class ClientSession:
    def __init__(self, function: PciFunction, fds: ClientFds, refused: Callable[[UapiError], None]) -> None:
        """`refused` is told of each error reply, sent or not."""
        assert len(function.regions) == PCI_REGIONS
        assert len(function.irqs) == PCI_IRQS
        self._function = function
        self._fds = fds
        self._refused = refused
        self._greeted = False
        self._write_multiple = False
        self.windows = DmaTable()
        self._irqs = Irqs(function)

    async def handle(self, message: ClientMessage) -> MessageAnswer | None:
        """The next when the one before is answered.  PeerError: the client has not begun as it must."""
        try:
            if not self._greeted:
                answer = self._greet(message)
            else:
                # await: message: cannot change: the caller's own; one message at a time
                answer = await self._perform(message)
        except UapiError as error:
            self._refused(error)
            answer = MessageAnswer(reply_to(message, errno=error.errno))
        finally:
            while message.fds:
                self._fds.close(message.fds.pop())
        return answer if message.wants_reply else None

    async def close(self) -> None:
        """The client has gone: what was its own goes, the function's state stays [vfio-user Client
        Disconnection].
        """
        self._irqs.clear_all()
        for window in self.windows:
            await self._unmap(window)

    def _greet(self, message: ClientMessage) -> MessageAnswer:
        if message.command != ClientCommand.VERSION:
            raise PeerError(f"the first message is command {message.command}, not VERSION")
        agreed = negotiate(message.body)
        self._greeted, self._write_multiple = True, agreed.write_multiple
        return MessageAnswer(reply_to(message, agreed.answer))

    async def _perform(self, message: ClientMessage) -> MessageAnswer:
        if message.command in NOT_OFFERED:
            raise UapiError(EOPNOTSUPP, f"{ClientCommand(message.command).name} is not offered")
        perform = self._COMMANDS.get(message.command)
        if perform is None:
            raise UapiError(EINVAL, f"command {message.command} is none of a client's")
        if message.fds and message.command not in self._WITH_FDS:
            raise UapiError(EINVAL, f"{len(message.fds)} fds came with command {message.command}")
        # await: message, asked: cannot change: as in `handle`; what a server offers is constant
        answer = await perform(self, message)
        return answer if isinstance(answer, MessageAnswer) else MessageAnswer(reply_to(message, answer))

    # -- memory ----------------------------------------------------------------------------------------

    async def _dma_map(self, message: ClientMessage) -> bytes:
        asked = DmaMap.from_body(message.body)
        if len(message.fds) > 1:
            raise UapiError(EINVAL, f"DMA_MAP: {len(message.fds)} fds, one window has one")
        fd = message.fds[0] if message.fds else None
        window = DmaWindow(asked.start, asked.size, asked.flags, asked.offset, fd)
        check_window(window)
        self.windows.add(window)
        try:
            # await: message, window, asked: cannot change: one message at a time, so the table is this one's
            await self._function.map(window)
        except UapiError:
            self.windows.remove(window)
            raise
        message.fds.clear()
        return b""

    async def _dma_unmap(self, message: ClientMessage) -> bytes:
        asked = DmaUnmap.from_body(message.body)
        for window in self.windows if asked.everything else [self.windows.find(asked.start, asked.size)]:
            # await: message, each window: cannot change: one message at a time, so nobody else unmaps one
            await self._unmap(window)
        return message.body

    async def _unmap(self, window: DmaWindow) -> None:
        await self._function.unmap(window)
        self.windows.remove(window)
        if window.fd is not None:
            self._fds.close(window.fd)

    # -- what the function is --------------------------------------------------------------------------

    async def _get_info(self, message: ClientMessage) -> bytes:
        records.check_device_info(message.body)
        return records.device_info(DeviceFlags.RESET | DeviceFlags.PCI, PCI_REGIONS, PCI_IRQS)

    async def _get_region_info(self, message: ClientMessage) -> MessageAnswer:
        query = RegionQuery.from_body(message.body)
        region = self._region(query.region)
        flags = RegionFlags(0)
        if region.size:
            flags |= RegionFlags.READ | (RegionFlags.WRITE if region.writable else RegionFlags(0))
        if region.file is None:
            payload, _ = records.region_info(query, flags, region.size, 0, ())
            return MessageAnswer(reply_to(message, payload))
        flags |= RegionFlags.MMAP
        payload, whole = records.region_info(query, flags, region.size, region.file.offset, region.file.areas)
        return MessageAnswer(reply_to(message, payload), (region.file.fd,) if whole else ())

    async def _get_irq_info(self, message: ClientMessage) -> bytes:
        index = records.irq_query(message.body)
        count = self._irqs.count(index)
        return records.irq_info(IrqFlags.EVENTFD if count else IrqFlags(0), index, count)

    def _region(self, index: int) -> PciRegion:
        if index >= PCI_REGIONS:
            raise UapiError(EINVAL, f"region {index}: there are {PCI_REGIONS}")
        return self._function.regions[index]

    # -- what it does ----------------------------------------------------------------------------------

    async def _set_irqs(self, message: ClientMessage) -> bytes:
        asked = IrqSet.from_body(message.body)
        self._irqs.check(asked, len(message.fds))
        events = []
        try:
            while message.fds:
                events.append(self._fds.event_of(message.fds[0]))
                del message.fds[0]
        except UapiError:
            for event in events:
                event.close()
            raise
        self._irqs.perform(asked, events)
        return b""

    async def _region_read(self, message: ClientMessage) -> bytes:
        access = RegionAccess.read_from(message.body)
        self._check(access)
        # await: access: cannot change: made of this message, and constant
        data = await self._function.read(access.region, access.offset, access.length)
        assert len(data) == access.length, f"{len(data)} bytes read, {access.length} were asked for"
        return access.answer(data)

    async def _region_write(self, message: ClientMessage) -> bytes:
        access = RegionAccess.write_from(message.body)
        self._check(access, write=True)
        # await: access: cannot change: made of this message, and constant
        await self._function.write(access.region, access.offset, access.data)
        return access.answer()

    async def _region_write_multi(self, message: ClientMessage) -> bytes:
        if not self._write_multiple:
            raise UapiError(EOPNOTSUPP, "REGION_WRITE_MULTI: write_multiple was not negotiated")
        accesses = records.writes_from(message.body)
        for access in accesses:  # all of them, before the first is made
            self._check(access, write=True)
        for access in accesses:
            # await: accesses, each access, asked: cannot change: made of this message; an agreement stays
            await self._function.write(access.region, access.offset, access.data)
        return records.writes_answer(len(accesses))

    async def _reset(self, message: ClientMessage) -> bytes:
        if message.body:
            raise UapiError(EINVAL, f"DEVICE_RESET: {len(message.body)} bytes, not 0")
        # await: asked: cannot change: the body of this message
        await self._function.reset()
        return b""

    def _check(self, access: RegionAccess, *, write: bool = False) -> None:
        region = self._region(access.region)
        what = f"{access.length} bytes at {access.offset:#x} of region {access.region}"
        if not 0 < access.length <= MAX_DATA_XFER_BYTES:
            raise UapiError(EINVAL, f"{what}: 1 to {MAX_DATA_XFER_BYTES} at once")
        if access.offset + access.length > region.size:
            raise UapiError(EINVAL, f"{what}: it has {region.size}")
        if write and not region.writable:
            raise UapiError(EINVAL, f"{what}: it is read-only")

    _COMMANDS: ClassVar[
        dict[int, Callable[[ClientSession, ClientMessage], Awaitable[bytes | MessageAnswer]]]
    ] = {
        ClientCommand.DMA_MAP: _dma_map,
        ClientCommand.DMA_UNMAP: _dma_unmap,
        ClientCommand.DEVICE_GET_INFO: _get_info,
        ClientCommand.DEVICE_GET_REGION_INFO: _get_region_info,
        ClientCommand.DEVICE_GET_IRQ_INFO: _get_irq_info,
        ClientCommand.DEVICE_SET_IRQS: _set_irqs,
        ClientCommand.REGION_READ: _region_read,
        ClientCommand.REGION_WRITE: _region_write,
        ClientCommand.REGION_WRITE_MULTI: _region_write_multi,
        ClientCommand.DEVICE_RESET: _reset,
    }
    _WITH_FDS: ClassVar = frozenset({ClientCommand.DMA_MAP, ClientCommand.DEVICE_SET_IRQS})
