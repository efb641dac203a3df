"""Mistakes a vfio-user server can have, each as a change of one function: what the fuzzer must find."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from protocol.errors import UapiError
from protocol.units import Iova
from vfio_user.core import records, session, stream
from vfio_user.core.dma_table import DmaTable
from vfio_user.core.function import DmaWindow, IrqEvent
from vfio_user.core.irqs import Irqs
from vfio_user.core.records import DmaMap, IrqSet, IrqSetFlags, RegionAccess
from vfio_user.core.session import ClientSession, MessageAnswer
from vfio_user.core.stream import ClientMessage, Header, MessageStream

Patch = pytest.MonkeyPatch


def overlaps_are_mapped(patch: Patch) -> None:
    def add(self: DmaTable, window: DmaWindow) -> None:
        self._windows.append(window)

    patch.setattr(DmaTable, "add", add)


def a_part_is_unmapped(patch: Patch) -> None:
    find = DmaTable.find

    def generous(self: DmaTable, start: Iova, size: int) -> DmaWindow:
        found = [window for window in self if window.start == start and window.size >= size > 0]
        return found[0] if found else find(self, start, size)

    patch.setattr(DmaTable, "find", generous)


def an_unmapped_fd_stays_open(patch: Patch) -> None:
    async def unmap(self: ClientSession, window: DmaWindow) -> None:
        await self._function.unmap(window)
        self.windows.remove(window)

    patch.setattr(ClientSession, "_unmap", unmap)


def a_refused_window_stays(patch: Patch) -> None:
    patch.setattr(DmaTable, "remove", lambda self, window: None)


def the_end_of_a_region_is_not_looked_at(patch: Patch) -> None:
    def check(self: ClientSession, access: RegionAccess, *, write: bool = False) -> None:
        if access.offset >= self._region(access.region).size or access.length == 0:
            raise UapiError(22, "outside")

    patch.setattr(ClientSession, "_check", check)


def read_only_regions_are_written(patch: Patch) -> None:
    check = ClientSession._check
    patch.setattr(ClientSession, "_check", lambda self, access, write=False: check(self, access))


def posted_messages_are_answered(patch: Patch) -> None:
    completed = MessageStream._completed

    def completed_wrong(self: MessageStream) -> ClientMessage:
        message = completed(self)
        message.wants_reply = True
        return message

    patch.setattr(MessageStream, "_completed", completed_wrong)


def replies_are_taken_for_commands(patch: Patch) -> None:
    check = stream.check_header
    patch.setattr(stream, "check_header", lambda header: check(header._replace(flags=header.flags & 0x10)))


def short_sizes_are_believed(patch: Patch) -> None:
    def check(header: Header) -> None:
        check_header(header._replace(size=max(header.size, 16)))

    check_header = stream.check_header
    patch.setattr(stream, "check_header", check)


def fds_of_a_refused_message_stay_open(patch: Patch) -> None:
    perform = ClientSession._perform

    async def forgetful(self: ClientSession, message: ClientMessage) -> MessageAnswer:
        try:
            return await perform(self, message)
        except UapiError:
            message.fds.clear()
            raise

    patch.setattr(ClientSession, "_perform", forgetful)


def missing_fds_change_nothing(patch: Patch) -> None:
    perform = Irqs.perform

    def keeps(self: Irqs, asked: IrqSet, events: Sequence[IrqEvent]) -> None:
        if asked.data is IrqSetFlags.DATA_EVENTFD and not events:
            return
        perform(self, asked, events)

    patch.setattr(Irqs, "perform", keeps)


def a_replaced_event_stays_open(patch: Patch) -> None:
    def put(self: Irqs, index: int, start: int, events: Sequence[IrqEvent | None]) -> None:
        self._events[index][start : start + len(events)] = events
        self._function.set_irqs(index, start, events)

    patch.setattr(Irqs, "_set", put)


def events_outlive_their_client(patch: Patch) -> None:
    patch.setattr(Irqs, "clear_all", lambda self: None)


def unknown_flags_pass(patch: Patch) -> None:
    """What the server did: the complement of an IntFlag has no bits but those that have names."""
    read = IrqSet.from_body

    def forgiving(body: bytes) -> IrqSet:
        if len(body) >= 20:
            body = body[:4] + struct.pack("<I", struct.unpack_from("<I", body, 4)[0] & 0x3F) + body[8:]
        return read(body)

    patch.setattr(IrqSet, "from_body", forgiving)


def a_window_wraps_around(patch: Patch) -> None:
    patch.setattr(session, "check_window", lambda window: None)


def half_of_the_writes_are_made(patch: Patch) -> None:
    async def one_by_one(self: ClientSession, message: ClientMessage) -> bytes:
        accesses = records.writes_from(message.body)
        for access in accesses:
            self._check(access, write=True)
            await self._function.write(access.region, access.offset, access.data)
        return records.writes_answer(len(accesses))

    patch.setitem(ClientSession._COMMANDS, 15, one_by_one)


def a_whole_answer_whatever_argsz(patch: Patch) -> None:
    told = records.region_info

    def long(query: records.RegionQuery, *others: Any) -> tuple[bytes, bool]:
        return told(query._replace(argsz=1 << 20), *others)

    patch.setattr(records, "region_info", long)


def two_fds_make_one_window(patch: Patch) -> None:
    perform = ClientSession._dma_map

    async def lenient(self: ClientSession, message: ClientMessage) -> bytes:
        DmaMap.from_body(message.body)
        while len(message.fds) > 1:
            self._fds.close(message.fds.pop())
        return await perform(self, message)

    patch.setitem(ClientSession._COMMANDS, 2, lenient)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    overlaps_are_mapped,
    a_part_is_unmapped,
    an_unmapped_fd_stays_open,
    a_refused_window_stays,
    the_end_of_a_region_is_not_looked_at,
    read_only_regions_are_written,
    posted_messages_are_answered,
    replies_are_taken_for_commands,
    short_sizes_are_believed,
    fds_of_a_refused_message_stay_open,
    missing_fds_change_nothing,
    a_replaced_event_stays_open,
    events_outlive_their_client,
    unknown_flags_pass,
    a_window_wraps_around,
    half_of_the_writes_are_made,
    a_whole_answer_whatever_argsz,
    two_fds_make_one_window,
)
