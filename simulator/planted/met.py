"""To which planted mistakes it came: their lines tell (plant.py), wherever they run, in a process that was
forked from this one, too.
"""

from __future__ import annotations

from mmap import PAGESIZE, mmap

_shared = mmap(-1, PAGESIZE)  # a byte each
_numbers: dict[str, int] = {}


def number_of(plant: str) -> int:
    """What its lines have to say."""
    return _numbers.setdefault(plant, len(_numbers))


def meet(number: int) -> None:
    _shared[number] = 1


def met() -> frozenset[str]:
    """Ids of those that were come to since this was asked before."""
    told = _shared[: len(_numbers)]
    _shared[: len(_numbers)] = bytes(len(_numbers))
    return frozenset(name for name, number in _numbers.items() if told[number])
