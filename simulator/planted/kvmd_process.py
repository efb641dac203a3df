"""Mistakes in what kvmd does for a process: what it asks for of its memory, what is pinned and who pays."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

KVMD_PROCESS = (
    # -- pins ----------------------------------------------------------------------------------------------
    Plant(
        "I6-unpinned-and-counted",
        "A page that is unpinned counts its pin for good, and is given up by nobody.",
        "I6",
        [Edit("kvmd.core.mm.mm:Mm.unpin", "page.pins -= 1", "pass")],
    ),
    Plant(
        "I6-pins-never-put",
        "What a VM had pinned it lets go of, and tells nobody.",
        "I6",
        [Edit("kvmd.core.export.pinning:Pinning.put", "self._frames.mm.unpin(page)", "pass")],
    ),
    Plant(
        "I6-unpinned-and-charged",
        "Who unpins pages is charged for them on, until he may pin no more.",
        "I6",
        [Edit("kvmd.core.mm.locked:LockedVm.uncharge", "self.pages -= npages", "pass")],
    ),
)
