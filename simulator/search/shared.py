"""Places that several processes touch, as learned from the steps that were taken.

A process's own state is touched by its steps and by all that is told it, and is no place that others see.
"""

from __future__ import annotations

from collections.abc import Hashable, Set

from simulator.search.option import Option, Touch, process_of


class SharedPlaces:
    def __init__(self) -> None:
        self._toucher: dict[Hashable, str] = {}
        self.places: set[Hashable] = set()

    def took(self, step: Option) -> None:
        process = process_of(step.actor)
        for touch in step.touches:
            if self._toucher.setdefault(touch.place, process) != process:
                self.places.add(touch.place)

    def has_any_of(self, touches: Set[Touch]) -> bool:
        return any(touch.place in self.places for touch in touches)

    def among(self, touches: Set[Touch]) -> frozenset[Touch]:
        return frozenset(touch for touch in touches if touch.place in self.places)
