"""What is made of table pages, and who lends what of it to whom (I10, I13, I15, R15)."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.ghost.backing import Name
from simulator.ghost.caches import Holder
from simulator.ghost.violation import Verdicts

Importing = tuple[Holder, Name | None]
"""An importer, and the view whose root it imports: a driver has one name in all VMs."""


@dataclass(frozen=True, slots=True)
class RootFacts:
    """Of which view it is, and who fills it and so answers for it to the host."""

    view: Name | None
    filler: Name


class Lent:
    """The roots that are exported: one of a view at a time, and what its CPUs run on is that one; and their
    importers, by what their hardware caches in.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._level_of: dict[Name | None, int] = {}
        self._told: dict[Importing, int] = {}  # of who is registered, when it was told last

    def lends(self, view: Name | None, level: int) -> None:
        """A root of the view, of so many levels."""
        if view in self._level_of:
            self._verdicts.say("I10", f"a root of {view} is lent, of which one is lent already")
        self._level_of[view] = level

    def takes_back(self, view: Name | None) -> None:
        self._level_of.pop(view, None)

    def ends(self, view: Name | None, *, leases: int) -> None:
        """Nobody has its TDP FD any more; so many leases of importers last on (I13)."""
        if leases:
            self._verdicts.say("I13", f"the root of {view} is lent no more, and {leases} leases on it last")

    def forget(self) -> None:
        """Who lent them died."""
        self._level_of.clear()
        self._told.clear()

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

    # -- importers -------------------------------------------------------------------------------------

    def describes(self, view: Name | None) -> None:
        """An importer is given the metadata of the view's root."""
        if view not in self._level_of:
            self._verdicts.say(
                "I10", f"an importer is told of the root of {view}, which is not lent any more"
            )

    def registers(self, importing: Importing, now: int) -> None:
        importer, view = importing
        if view not in self._level_of:
            what = f"{' '.join(importer)} registers for the root of {view}"
            self._verdicts.say("I15", f"{what}, which is not lent any more")
        self._told[importing] = now

    def tells(self, importing: Importing, now: int) -> None:
        importer, view = importing
        if importing not in self._told:
            what = f"{' '.join(importer)} is told of a flush of {view}"
            self._verdicts.say("I15", f"{what}, and is not registered")
        self._told[importing] = now

    def unregisters(self, importing: Importing) -> None:
        self._told.pop(importing, None)

    def rule(self, importer: Holder, view: Name | None, issued: int) -> str:
        """What is broken if it has of the view's root still what a flush was to take."""
        if view not in self._level_of:
            return "I13"
        return "R17" if self._told.get((importer, view), -1) >= issued else "I15"
