"""The kinds of faults by name: what `--faults` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FaultKind:
    """`late`: the last of its opportunities is among the first 2**late.  `excuses`: a VMM may be denied what
    it asks because of one; `lasts`: for as long as its machine is there."""

    what: str
    late: int
    excuses: bool = False
    lasts: bool = False
    searched: bool = True  # a search that ends may have it: all that it changes is in what steps touch


FAULTS: Mapping[str, FaultKind] = {
    "evict": FaultKind("a unit or a device drops what it has cached, as it may at any time", 5),
    "enomem": FaultKind(
        "a daemon gets no memory, page of a table, frame or fd, or may lock no more", 4, excuses=True
    ),
    "ite": FaultKind("a device completes an invalidation late, or none any more: it times out", 2),
    "full": FaultKind("a unit's page request queue has no room, once or four times: others fill it", 3),
    "hangup": FaultKind(
        "a process hangs up on another at a message, and both live", 8, excuses=True, lasts=True
    ),
    "delay": FaultKind("a message is late, and so are those behind it in its channel", 8),
    "store-buffer": FaultKind(
        "others see a daemon's stores as late as its processor may let them", 7, searched=False
    ),
    "sigstop": FaultKind("a daemon stands still for a while", 10, searched=False),
    "sigkill": FaultKind(
        "a daemon or the VMM dies at any step of its; daemons are started again",
        10,
        excuses=True,
        lasts=True,
        searched=False,
    ),
}

ALL = ",".join(FAULTS)
FAULTED_COST = 16
"""Of a schedule with all of them: the scenario is played twice, and a machine rarely serves a second."""


EACH = ":each"
"""Behind a kind that is searched: it is not drawn beforehand at which of its opportunities there is one, but
asked at each of them, until there was."""


class UnknownFaults(ValueError):
    """The message says which there are."""


def kinds_of(text: str) -> Sequence[str]:
    """`evict:each,sigkill` -> in the order of FAULTS.  UnknownFaults."""
    given = {name.removesuffix(EACH): name for name in text.split(",") if name}
    if unknown := given.keys() - FAULTS.keys():
        raise UnknownFaults(
            f"no faults are called {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}"
        )
    if drawn := [name for name in given.values() if name.endswith(EACH) and not is_searched(name)]:
        raise UnknownFaults(f"{', '.join(drawn)}: that kind is drawn beforehand, without {EACH}")
    return [given[name] for name in FAULTS if name in given]


def is_searched(kind: str) -> bool:
    return FAULTS[kind.removesuffix(EACH)].searched


def drawn_among(text: str) -> str:
    """The same for people: all of what is drawn is said of so many opportunities and no more."""
    return ", ".join(
        kind if kind.endswith(EACH) else f"{kind} (the first {1 << FAULTS[kind].late})"
        for kind in kinds_of(text)
    )
