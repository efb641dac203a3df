"""What a judge says, and whom he tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_INVARIANT = re.compile(r"\b([IR]\d+)\b: ")


def invariant_of(sentence: str) -> str:
    """The number that what a scenario or a daemon says names, "" if none."""
    named = _INVARIANT.search(sentence)
    return "" if named is None else named[1]


@dataclass(frozen=True, slots=True)
class Violation:
    """`invariant`: its number in docs/invariants.md."""

    invariant: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.sentence}"


class Verdicts:
    """All that was found, in order, each once; `tell` hears of one in the step in which it is found."""

    def __init__(self, tell: Callable[[Violation], None] = lambda violation: None) -> None:
        self._found: dict[Violation, None] = {}
        self._tell = tell

    @property
    def found(self) -> list[Violation]:
        return list(self._found)

    def say(self, invariant: str, sentence: str) -> None:
        violation = Violation(invariant, sentence)
        if violation not in self._found:
            self._found[violation] = None
            self._tell(violation)
