"""What a step touches, by the names of `simulator/search/option.py`: of each kind of place, who says so.

Too much costs runs, too little hides an order that matters: the search then takes two runs for one, and never
looks at the second.
"""

from __future__ import annotations

from functools import lru_cache

from simulator.kernel.files import Memory, OpenFile, StreamEnd
from simulator.search.option import Touch
from simulator.world.memory import FRAMES

NAMES = 1 << 12  # of channels that are remembered
CLOCK = ("clock",)
TIME_PASSES = frozenset({Touch(CLOCK, True)})
TIME_STANDS = frozenset({Touch(CLOCK, False)})

_GRAIN = {FRAMES: 2048}  # of a frame: what a piece of a device's copy has
_GRAIN_ELSE = 8
"""Bytes that are one place."""

OF_BOTH_ENDS = frozenset({"shutdown", "register", "modify"})
"""What happens to a file and has to do with the other end of the channel, too: whether that hung up, or has
room.
"""


def state_of(process: str) -> frozenset[Touch]:
    """Each of its steps may use what the one before changed."""
    return frozenset({Touch(("process", process), True)})


def queues_of(file: OpenFile, both_ends: bool) -> frozenset[Touch]:
    """What is under way to that end of a channel, or an eventfd's count."""
    peer = file.peer if both_ends else None
    return _queue(file.name) if peer is None else _queue(file.name) | _queue(peer.name)


@lru_cache(NAMES)
def emptiness_of(names: tuple[str, ...]) -> frozenset[Touch]:
    """Whoever watches those goes on because nothing is there: what comes, comes behind that."""
    return frozenset(Touch(("channel", name), False) for name in names)


def closed_with(file: OpenFile) -> frozenset[Touch]:
    """What goes may be the last that holds it: its other end hears of that, and those of all that was on the
    way to it.
    """
    found = queues_of(file, both_ends=True)
    for other in file.on_the_way if isinstance(file, StreamEnd) else ():
        found |= closed_with(other)
    return found


@lru_cache(NAMES)
def _queue(name: str) -> frozenset[Touch]:
    return frozenset({Touch(("channel", name), True)})


def access_of(memory: Memory, at: int, size: int, writes: bool) -> tuple[str, frozenset[Touch]]:
    """A load or store there: what people are told of it, and its words."""
    return told_of(memory, at, writes), frozenset(words_of(memory, at, size, writes))


def words_of(memory: Memory, at: int, size: int, writes: bool) -> list[Touch]:
    grain = _GRAIN.get(memory.made_as, _GRAIN_ELSE)
    numbers = range(at // grain, -(-(at + size) // grain))
    return [Touch(("word", memory.name, number), writes) for number in numbers]


def told_of(memory: Memory, at: int, writes: bool) -> str:
    """A load or store there, for people."""
    return f"{'stores' if writes else 'loads'} {memory.name}[{at >> 3}]"
