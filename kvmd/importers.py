"""Importers of a table or of a process's memory: invalidate over their channel, and what their death means.

The reply to an invalidate is the ack.  An importer that dies with one outstanding has not acked: then its
lease is what is waited for (`kvmd/core/lease.py`, I13).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import structlog

from kvmd.core.lease import Lease, ack_with_lease
from kvmd.memory import HostMemory
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hostmem import WindowKind
from protocol.rpc.channel import Channel, PeerGone, Reply
from protocol.rpc.lease import LeaseSocket
from protocol.rpc.loop import Loop

ACK_PATIENCE_S = 10.0
TDP_WINDOWS = frozenset(WindowKind)
FRAME_WINDOWS = frozenset({WindowKind.FRAMES, WindowKind.FRAME_TAGS})

log = structlog.get_logger("kvmd")


class Loan(NamedTuple):
    lease: LeaseSocket
    windows: list[tuple[str, int, int]]
    fds: list[int]  # of the windows, then the lease


@contextmanager
def lent(loop: Loop, memory: HostMemory, kinds: Container[WindowKind]) -> Iterator[Loan]:
    """Windows and a lease for an importer; taken back if it does not become one.  EMFILE."""
    lease = LeaseSocket(loop)
    fds: list[int] = []
    try:
        windows, fds = memory.share(kinds)
        yield Loan(lease, windows, [*fds, lease.theirs])
    except UapiError:
        for fd in fds:
            loop.kernel.close(fd)
        lease.withdraw()
        raise


class RemoteImporter:
    """ImporterOps and MirrorOps over a channel: `op` tells of a range, and of its number under the name
    `numbered`."""

    def __init__(self, channel: Channel, lease: Lease, op: str, numbered: str) -> None:
        self._channel = channel
        self._lease = lease
        self._op = op
        self._numbered = numbered

    def invalidate(self, start: int, size: int, number: int, /) -> Wait[None]:
        acked: Wait[None] = Wait()
        self._tell(start, size, number).on_done(lambda wait: self._on_reply(wait, acked))
        self._channel.loop.expire(acked, ACK_PATIENCE_S, lambda: self._complain(number))
        return acked

    def _tell(self, start: int, size: int, number: int) -> Wait[Reply]:
        return self._channel.call(self._op, {"start": start, "size": size, self._numbered: number})

    def _on_reply(self, reply: Wait[Reply], acked: Wait[None]) -> None:
        try:
            reply.result().fds.close()  # an ack carries none
        except (PeerGone, UapiError) as error:
            log.warning("importer did not ack: its pages are held until its lease ends", why=str(error))
            ack_with_lease(self._lease, acked)
        else:
            acked.set(None)

    def _complain(self, number: int) -> None:
        told = {"op": self._op, self._numbered: number, "importer": self._channel.name}
        log.error("no ack for an invalidation", after_s=ACK_PATIENCE_S, **told)
