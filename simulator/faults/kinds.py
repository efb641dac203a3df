"""The kinds of faults by name: what `--faults` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FaultKind:
    """`late`: the last of its opportunities is among the first 2**late."""

    what: str
    late: int
    excuses: bool = False  # a VMM may be denied what it asks because of one


FAULTS: Mapping[str, FaultKind] = {
    "evict": FaultKind("a unit or a device drops what it has cached, as it may at any time", 5),
    "enomem": FaultKind("a daemon gets no memory, page of a table, frame or fd", 4, excuses=True),
    "ite": FaultKind("a device completes an invalidation late, or none any more: it times out", 2),
    "full": FaultKind("a unit's page request queue has no room: other functions have filled it", 3),
    "hangup": FaultKind("a process hangs up on another at a message, and both live", 8, excuses=True),
    "delay": FaultKind("a message is late, and so are those behind it in its channel", 8),
    "store-buffer": FaultKind("others see a daemon's stores as late as its processor may let them", 7),
    "sigstop": FaultKind("a daemon stands still for a while", 10),
    "sigkill": FaultKind(
        "a daemon or the VMM dies at any step of its; daemons are started again", 10, excuses=True
    ),
}


class UnknownFaults(ValueError):
    """The message says which there are."""


def kinds_of(text: str) -> Sequence[str]:
    """`evict,sigkill` -> in the order of FAULTS.  UnknownFaults."""
    given = [name for name in text.split(",") if name]
    unknown = [name for name in given if name not in FAULTS]
    if unknown:
        raise UnknownFaults(f"no faults are called {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    return [name for name in FAULTS if name in given]
