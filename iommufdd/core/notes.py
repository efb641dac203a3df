"""KVM's notes "I have faulted in gfn A, you might want to do the same": approach B of the review.

A note is fire-and-forget: it maps what the host has there now, and does not fault.  Notes are worked off one
after the other, in their order, by a flow nobody waits for; one that is lost, because too many wait or the
host took the page away meanwhile, costs an IO page fault and nothing else.  The iova is the gpa.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Protocol

from iommufdd.core.ioas_on_demand import FaultSubscription, IoasOnDemand
from protocol.errors import UapiError
from protocol.flow import Flow
from protocol.units import PAGE_SHIFT, Gfn, Iova, gpa_of, iova_of_gpa

MAX_WAITING = 4096


class Notes:
    def __init__(self, ioas: IoasOnDemand, spawn: Callable[[Flow[None]], None]) -> None:
        self._ioas = ioas
        self._counts = ioas.counts
        self._spawn = spawn
        self._waiting: deque[tuple[Iova, int]] = deque()  # the first is being worked on

    def told(self, gfn: Gfn, npages: int) -> None:
        self._counts.notes += 1
        if len(self._waiting) >= MAX_WAITING:
            self._counts.notes_lost += 1
            return
        self._counts.notes_pending += 1
        self._waiting.append((iova_of_gpa(gpa_of(gfn)), npages << PAGE_SHIFT))
        if len(self._waiting) == 1:
            self._spawn(self._work())

    async def _work(self) -> None:
        while self._waiting:
            try:
                mapped = await self._ioas.look(*self._waiting[0])
                self._counts.notes_mapped += mapped  # read after the look: other IOASes count there too
            except UapiError:  # the host or the process is gone, or there is no page for a table
                self._counts.notes_lost += 1
            finally:
                self._waiting.popleft()
                self._counts.notes_pending -= 1


class NotesChannel(FaultSubscription, Protocol):
    """To the VM whose fd was given; `on_note(gfn, npages)` and `on_gone()` are called from then on."""

    async def open(self) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: no VM's fd; EMFILE."""


async def follow(
    ioas: IoasOnDemand,
    channel_of: Callable[[Callable[[Gfn, int], None], Callable[[], None]], NotesChannel],
    spawn: Callable[[Flow[None]], None],
) -> None:
    """Notes of a VM are looked at from now on, until it or the IOAS goes.  EBUSY: those of another are;
    EBADF: one of them went meanwhile; errors as of `NotesChannel.open`.
    """
    if ioas.following is not None:
        raise UapiError(errno.EBUSY, f"IOAS {ioas.id} follows a VM")

    def gone() -> None:
        if ioas.following is channel:
            ioas.following = None

    channel = ioas.following = channel_of(Notes(ioas, spawn).told, gone)
    try:
        # await: channel, gone, ioas: the VM may go, or the IOAS; asked again: behind it
        # (tests/unit/iommufdd/test_notes.py::test_an_ioas_destroyed_while_it_begins_to_follow_is_ebadf)
        await channel.open()
        if ioas.following is not channel:
            raise UapiError(errno.EBADF, "the iommufd was closed meanwhile, or the VM is gone")
    except UapiError:
        gone()
        channel.hang_up()
        raise
