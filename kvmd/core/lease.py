"""What an importer is lent, as long as it lasts.

A reference on another process's behalf (docs/decisions/0004): it ends when every copy of its fd is closed,
wherever that is, and until then something may walk what was lent with it.  Invariant I13 has its home here:
nothing is freed behind a walker nobody answers for, so whoever frees waits for the ack of each importer, and
for the end of its lease where none can come any more.
"""

from __future__ import annotations

from typing import Protocol

from protocol.flow import Wait


class Lease(Protocol):
    @property
    def ended(self) -> Wait[None]: ...


def ack_with_lease(lease: Lease, acked: Wait[None]) -> None:
    """The importer died, or failed, before it acked: what walks on its behalf may walk on until its lease
    ends."""
    lease.ended.on_done(lambda _: acked.set(None))
