"""For which races, defects and planted bugs each story was written, as its text or its commit says.

Who finds one by such a story has found what was put there to be found.  A new story has its line here, an
empty one if it is only of what a host, a VMM or a device does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulator.planted.plant import Plant

WRITTEN_FOR: Mapping[str, Sequence[str]] = {
    # -- a device's access beside one change
    "two-discard": [],
    "two-migrate": [],
    "two-slot": [],
    "three-discard": [],
    "three-migrate": [],
    "three-swap": [],
    "three-age": [],
    "three-slot": [],
    "discard": [],
    "migrate": [],
    "swap": [],
    "hint": [],
    "age": [],
    "fault": [],
    "discards": [],
    "both": [],
    "high": ["B-31"],
    "fork": ["R22"],
    "merge": ["R22", "merged-and-writable"],
    "protect": [],
    "huge": [],
    "asleep": ["R1", "R21"],
    "two-move": ["R15"],
    "moves": ["R15"],
    "move-hung": ["R28"],
    "two-changes": ["R1", "R2", "R4", "B-18"],
    "batches": ["B-33"],
    "poison": ["B-14", "poisoned-frame-is-lost"],
    # -- slots
    "slot": ["R21"],
    "slot-moves": ["R21"],
    "slot-shifts": ["R21", "ghosts-of-a-moved-slot"],
    "slot-asleep": ["R21", "equal-slot"],
    "slot-emulated": ["R21"],
    "slot-again": ["R21", "equal-slot"],
    "slot-first": ["B-25"],
    "slot-else": ["R3", "R21"],
    "slot-short": ["R3"],
    "slot-comes": [],
    # -- dirty logs
    "log": ["R19"],
    "ring": ["R19"],
    "ring-shrinks": ["R19-one-stale-entry-drops-all"],
    "ring-full": ["R19"],
    "log-short": ["R19"],
    "log-huge": ["R19"],
    "track": ["R19", "R20"],
    # -- pins
    "pin": [],
    "pin-drop": [],
    "pin-fork": ["R22"],
    "pin-swap": [],
    "pin-asleep": [],
    "pin-moves": ["R1"],
    "pin-twice": ["I28"],
    "shown-twice": ["I26"],
    "pin-read": ["R22"],
    "pin-all": ["I22-everything-but-what-comes"],
    "pin-slot": ["R21"],
    # -- devices that come and go
    "two-devices": ["R8"],
    "two-units": ["R8"],
    "late": ["R8", "R18"],
    "detach": ["R10", "R12"],
    "replace": ["R8"],
    "never": ["R18"],
    "never-comes": ["R18"],
    "never-comes-late": ["R18"],
    "or-back": ["R10"],
    "units": ["R15", "R16", "B-32"],
    "units-narrow": ["R16", "B-17"],
    "refetch": ["R7"],
    "medley": [],
    # -- page requests
    "across": [],
    "full": ["R9"],
    "full-move": ["R9"],
    "beyond": ["R11", "R12"],
    "beyond-full": ["R9"],
    "few": ["R11"],
    "detach-asleep": ["R10", "R12"],
    "detach-few": ["R10", "R12"],
    "detach-asks": ["R10", "R12", "B-12"],
    "detach-full": ["R9", "R10", "R12"],
    # -- private memory
    "convert": ["R24"],
    "hole": ["R24"],
    "convert-asleep": ["R1", "R24"],
    "unasked": ["R24", "I27"],
    # -- VMs that come and go
    "lend": ["R13"],
    "lend-dies": ["R28"],
    "lend-hung": ["R10"],
    "lend-short": ["R13"],
    "hang-up": ["R28"],
    "hang-up-on-one": ["R28"],
    "driver-dies": ["R28", "I13"],
    # -- HWPTs that come and go
    "hwpts": ["R10", "R13", "B-09"],
    "hwpt-by-half": ["I26-filled-by-half-and-kept"],
    "iommufd-closes": ["R10", "R13"],
    "vast": ["B-30"],
    "kvm-dies": ["R28"],
    "kvm-dies-idle": ["R10", "R28"],
    "export": ["R13", "I10", "B-02", "B-06", "B-27", "B-28", "export-under-a-log"],
    # -- another importer
    "importers": ["R4", "B-09"],
    "importers-fork": ["B-38"],
    "importers-slow": ["B-26"],
    "importers-huge": ["R5"],
    "importers-end": ["R26", "R28", "I13", "B-36"],
    # -- what else a process has
    "vm-comes": ["R26"],
    "hole-bound": ["R24"],
    "pin-dies": ["R26"],
    "heir": ["I6-taken-over-in-part", "I6-two-pay", "I14-process-is-kept"],
    "by-offset": ["I27"],
    # -- what a process asks for of its memory
    "remap": ["I11-told-of-where-a-page-goes", "I11-unmapped-and-told-then"],
    "write-protect": ["I21-write-protected-untold"],
    "free": ["I11-freed-untold"],
    "truncate": ["I11-truncated-but-for-one"],
    # -- what areas and slots show
    "owners": ["one-process-is-not-asked", "memory-of-whichever-process"],
    "read-only": ["writable-whatever-was-asked", "flag-of-rights-is-ignored", "read-only-slot-is-writable"],
    "copied": ["copied-from-the-start-of-the-area", "copied-with-more-rights"],
    # -- by other ways than the slot's
    "by-file": ["I11-swapped-out-is-a-hole"],
    "zeroes": ["I21-zeroes-are-writable"],
    "gmem-mapped": ["I11-hole-stays-mapped"],
    "payers": ["I6-process-without-a-limit"],
}


def is_written_for(story: str, plant: Plant) -> bool:
    """A story that is no more may have been."""
    cases = {plant.id, plant.invariant, *plant.races}
    return story not in WRITTEN_FOR or not cases.isdisjoint(WRITTEN_FOR[story])
