"""All seams, and the wrapping of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

from simulator.ghost.ghost import Ghost
from simulator.ghost.probes import (
    access,
    asked,
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
    pins,
    private,
    processes,
    tables,
    unit,
)
from simulator.ghost.probes.watch import Around, Watch

_ROOMS = (
    *(tables, host, private, access, ioas, cpu, faults, unit, attachments, processes, layout, importers),
    *(mmus, own, contents, logs, pins, asked),
)
SEAMS: dict[tuple[type, str], Around] = {
    seam: around for room in _ROOMS for seam, around in room.seams.items()
}
assert len(SEAMS) == sum(len(room.seams) for room in _ROOMS), "two rooms wrap one method"


class _Wrapped:
    """The seams, while somebody holds them wrapped: whoever watches last hears what is done there."""

    def __init__(self) -> None:
        self.holders = 0
        self.watches: list[Watch] = []
        self._before: dict[tuple[type, str], Callable[..., Any]] = {}

    def put_on(self) -> None:
        for (owner, name), around in SEAMS.items():
            original = self._before[owner, name] = vars(owner)[name]
            setattr(owner, name, _wrapped(self.watches, original, around))

    def take_off(self) -> None:
        for (owner, name), original in self._before.items():
            setattr(owner, name, original)
        self._before.clear()


_WRAPPED = _Wrapped()


def wrapping() -> Generator[None]:
    """From its first step on until it is closed, or dropped, one `watching` after the other finds the seams
    wrapped.  With each change of a class the interpreter loses what it knew of it: a thirtieth of a machine.
    """
    if not _WRAPPED.holders:
        _WRAPPED.put_on()
    _WRAPPED.holders += 1
    try:
        yield
    finally:
        _WRAPPED.holders -= 1
        if not _WRAPPED.holders:
            _WRAPPED.take_off()


@contextmanager
def watching(ghost: Ghost) -> Iterator[Watch]:
    """Inside, the ghost hears of everything that objects made inside do."""
    watch = Watch(ghost)
    with closing(wrapping()) as wraps:
        next(wraps)
        _WRAPPED.watches.append(watch)
        try:
            yield watch
        finally:
            _WRAPPED.watches.remove(watch)


def _wrapped(watches: list[Watch], original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def method(*args: Any, **named: Any) -> Any:
        if not watches or watches[-1].over:
            return original(*args, **named)
        return around(watches[-1], original, *args, **named)

    method.__wrapped__ = original  # type: ignore[attr-defined]  # a plant is put in there (planted/plant.py)
    return method
