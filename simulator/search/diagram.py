"""A run as a space-time diagram in text: a column a process, time downwards, and of the steps those that
matter.

A step matters if it races with one of another process, or if it was taken against the default; the rest
only says that programs run.  What a step is called is its caller's: it knows the names of table words.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from simulator.search.option import Option

DIAGRAM_WIDTH = 110
_GAP = "  "
_AGAINST_DEFAULT = "*"


@dataclass(frozen=True, slots=True)
class ShownStep:
    process: str
    text: str
    chosen: bool = False  # against the default


def racing(steps: Sequence[Option], process_of: Callable[[str], str]) -> set[int]:
    """Places in `steps` of those that another process's step directly before or behind depends on."""
    found: set[int] = set()
    writer: dict[Hashable, int] = {}
    readers: dict[Hashable, list[int]] = {}

    def pair(earlier: int, later: int) -> None:
        if process_of(steps[earlier].actor) != process_of(steps[later].actor):
            found.update((earlier, later))

    for place, step in enumerate(steps):
        for touch in step.touches:
            if touch.place in writer:
                pair(writer[touch.place], place)
            if touch.writes:
                for reader in readers.pop(touch.place, []):
                    pair(reader, place)
        for touch in step.touches:
            if touch.writes:
                writer[touch.place] = place
            else:
                readers.setdefault(touch.place, []).append(place)
    return found


def rows_of(
    steps: Sequence[Option],
    chosen: Iterable[int],
    process_of: Callable[[str], str],
    text_of: Callable[[Option], str],
) -> list[ShownStep]:
    """`chosen`: places in `steps` of those taken against the default.  `process_of` maps an actor to its
    process; what `text_of` has no text for is left out.
    """
    against = set(chosen)
    shown = sorted(racing(steps, process_of) | against)
    rows = [
        ShownStep(process_of(steps[place].actor), text_of(steps[place]), place in against) for place in shown
    ]
    return [row for row in rows if row.text]


def draw(rows: Sequence[ShownStep], width: int = DIAGRAM_WIDTH) -> str:
    """Columns in the order in which processes come first; a star before each row against the default."""
    processes = list(dict.fromkeys(row.process for row in rows))
    if not processes:
        return ""
    room = (width - len(_AGAINST_DEFAULT)) // len(processes) - len(_GAP)
    assert room > 0, f"{len(processes)} columns do not fit in {width}"

    def line(star: str, column: int, text: str) -> str:
        return (f"{star:{len(_AGAINST_DEFAULT)}}" + (_GAP + " " * room) * column + _GAP + text).rstrip()

    heads = "".join(f"{_GAP}{process[:room]:{room}}" for process in processes)
    lines = [" " * len(_AGAINST_DEFAULT) + heads.rstrip()]
    for row in rows:
        column = processes.index(row.process)
        for place, text in enumerate(wrap(row.text, room, subsequent_indent=" " if room > 1 else "")):
            lines.append(line(_AGAINST_DEFAULT if row.chosen and not place else "", column, text))
    return "\n".join(lines) + "\n"
