"""All seams, and the wrapping of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simulator.ghost.ghost import Ghost
from simulator.ghost.probes import (
    access,
    attachments,
    contents,
    cpu,
    faults,
    host,
    importers,
    ioas,
    layout,
    logs,
    mmus,
    own,
    private,
    processes,
    tables,
    unit,
)
from simulator.ghost.probes.watch import Around, Watch

_ROOMS = (
    *(tables, host, private, access, ioas, cpu, faults, unit, attachments, processes, layout, importers),
    *(mmus, own, contents, logs),
)
SEAMS: dict[tuple[type, str], Around] = {
    seam: around for room in _ROOMS for seam, around in room.seams.items()
}
assert len(SEAMS) == sum(len(room.seams) for room in _ROOMS), "two rooms wrap one method"


@contextmanager
def watching(ghost: Ghost) -> Iterator[Watch]:
    """Inside, the ghost hears of everything that objects made inside do."""
    watch = Watch(ghost)
    before = {(owner, name): vars(owner)[name] for owner, name in SEAMS}
    for (owner, name), around in SEAMS.items():
        setattr(owner, name, _wrapped(watch, before[owner, name], around))
    try:
        yield watch
    finally:
        for (owner, name), original in before.items():
            setattr(owner, name, original)


def _wrapped(watch: Watch, original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def method(*args: Any, **named: Any) -> Any:
        return original(*args, **named) if watch.over else around(watch, original, *args, **named)

    return method
