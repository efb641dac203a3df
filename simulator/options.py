"""What the simulator's commands are given: numbers, and stories on designs of which something is played."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from qemu_shim.vmm.designs import DESIGNS
from simulator.stories.library import STORIES


class NothingToPlay(LookupError):
    """A design would be said to hold without a schedule."""


def playable(names: Sequence[str], designs: Sequence[str]) -> list[tuple[str, str]]:
    """Each story on those of the designs (all) that it can be played on, before another; the design that is
    argued about first.  NothingToPlay: a design that was asked for would have no story.
    """
    pairs = list(_pairs(names, designs or [*reversed(DESIGNS)]))
    for design in designs:
        if all(of_pair != design for _, of_pair in pairs):
            raise NothingToPlay(f"none of {', '.join(names)} can be played on {design}: name another story")
    return pairs


def _pairs(names: Sequence[str], designs: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        for design in designs:
            if design in STORIES[name].playable:
                yield name, design


def none_or_more(text: str) -> int:
    return _at_least(0, text)


def one_or_more(text: str) -> int:
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value
