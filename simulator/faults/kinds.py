"""The kinds of faults by name: what `--faults` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """`late`: the last of its opportunities is among the first 2**late."""

    what: str
    late: int
    excuses: bool = False  # a VMM may be denied what it asks because of one


KINDS: Mapping[str, Kind] = {
    "evict": Kind("a unit or a device drops what it has cached, as it may at any time", 5),
    "enomem": Kind("a daemon gets no memory, page of a table, frame or fd", 4, excuses=True),
    "ite": Kind("a device completes an invalidation late, or none any more: it times out", 2),
    "sigstop": Kind("a daemon stands still for a while", 10),
    "sigkill": Kind(
        "a daemon or the VMM dies at any step of its; daemons are started again", 10, excuses=True
    ),
}


class UnknownFaults(ValueError):
    """The message says which there are."""


def kinds_of(text: str) -> Sequence[str]:
    """`evict,sigkill` -> in the order of KINDS.  UnknownFaults."""
    given = [name for name in text.split(",") if name]
    unknown = [name for name in given if name not in KINDS]
    if unknown:
        raise UnknownFaults(f"no faults are called {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return [name for name in KINDS if name in given]
