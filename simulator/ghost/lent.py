"""What is made of table pages, and who lends what of it to whom (I10, R15)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.ghost.backing import Name
from simulator.ghost.violation import Verdicts


@dataclass(frozen=True, slots=True)
class RootFacts:
    """Of which view it is, and who fills it and so answers for it to the host."""

    view: Name | None
    filler: Name


class Lent:
    """The roots that are exported: one of a view at a time, and what its CPUs run on is that one."""

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._level_of: dict[Name | None, int] = {}

    def lends(self, view: Name | None, level: int) -> None:
        """A root of the view, of so many levels."""
        if view in self._level_of:
            self._verdicts.say("I10", f"a root of {view} is lent, of which one is lent already")
        self._level_of[view] = level

    def takes_back(self, view: Name | None) -> None:
        self._level_of.pop(view, None)

    def forget(self) -> None:
        """Who lent them died."""
        self._level_of.clear()

    def runs_on(self, vcpu: int, view: Name, level: int) -> None:
        """A vCPU is told its width, by which its root has so many levels; it has not run yet."""
        lent = self._level_of.get(view)
        if lent not in (None, level):
            self._verdicts.say(
                "I10", f"vCPU {vcpu} leaves the root that {view} lends: {level} levels, not {lent}"
            )

    def snoops_no_more(self, view: Name) -> None:
        """A device is let in whose accesses caches of CPUs do not see."""
        if view in self._level_of:
            self._verdicts.say("R15", f"non-coherent DMA beside {view}, which is lent as write-back memory")
