"""IO page faults: requests gathered into groups, handled in order, each group answered once.

Models the IO page fault framework under the series [RFC 15/42], [RFC 23/42]: requests that are not the
last of their group wait for it; the last one makes the group run; faults of a group are handled in
order and the first that fails decides; then one page group response.  Requests without PASID are legal
(RFC-83); a stop marker is skipped; what the device may not ask is answered Invalid Request if it is the
last.

Invariant I8: one response a group, sent even if its device is detached meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from protocol.hw.prq import PageRequest

MAX_PARTIAL = 2048  # requests held back for the last of their group: as many as the ring has


class Verdict(Enum):
    HANDLE = auto()
    SKIP = auto()
    REFUSE = auto()


def judge(request: PageRequest) -> Verdict:
    """What the PRQ thread makes of one request, without looking at any domain [RFC 23/42]."""
    if request.is_stop_marker:
        return Verdict.SKIP
    privileged = request.priv and (request.read or request.write)
    if privileged or (request.exec and request.read) or request.pasid_present:
        return Verdict.REFUSE
    return Verdict.HANDLE


class Groups:
    """Partial groups of all functions."""

    def __init__(self) -> None:
        self._partial: dict[tuple[int, int], list[PageRequest]] = {}
        self._held = 0
        self.discarded = 0

    def gather(self, request: PageRequest) -> list[PageRequest] | None:
        """The whole group when `request` is its last, else None: it is held back."""
        key = request.rid, request.prgi
        if request.last:
            held = self._partial.pop(key, [])
            self._held -= len(held)
            return [*held, request]
        if self._held >= MAX_PARTIAL:
            self.discarded += 1
            return None
        self._partial.setdefault(key, []).append(request)
        self._held += 1
        return None

    def discard(self, rids: Iterable[int] | None = None) -> None:
        """Forget partial groups: after an overflow all of them, at a detach those of the function (R9)."""
        for key in [key for key in self._partial if rids is None or key[0] in rids]:
            held = self._partial.pop(key)
            self._held -= len(held)
            self.discarded += len(held)

    @property
    def held(self) -> int:
        return self._held
