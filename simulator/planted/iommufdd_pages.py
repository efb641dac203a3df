"""Mistakes in iommufdd's areas that are pinned whole: their pages, the files these are of, and who pays; and
in what it is given fds for."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

IOMMUFDD_PAGES = (
    Plant(
        "I26-filled-by-half-and-kept",
        "An HWPT whose second area cannot be pinned is none, and the first stays pinned for it.",
        "I26",
        [
            Edit(
                "iommufdd.core.ioas:Ioas.fill",
                "await self._pages[area].hide(area)",
                "pass",
            )
        ],
    ),
    Plant(
        "I6-taken-over-in-part",
        "Who may not pay for all that an iommufd has pinned pays for the first of it.",
        "I6",
        [
            Edit(
                "iommufdd.core.source:Sources.change_process",
                "for source in changed:",
                "for source in changed[1:]:",
            )
        ],
    ),
    Plant(
        "I14-file-is-never-closed",
        "Nobody shows a file's pages any more, and the host keeps it open.",
        "I14",
        [Edit("iommufdd.core.pages:Pages.put", "if self.file:", "if False:")],
    ),
    Plant(
        "fds-of-a-unit-stay",
        "What a unit's registers and eventfds came with is mapped and not closed: an fd for each link.",
        "I14",
        [Edit("iommufdd.unit_port:UnitPort.take", "fds.close()", "pass")],
    ),
    Plant(
        "I14-process-is-kept",
        "Of a process that nobody maps anything of any more the channel stays.",
        "I14",
        [Edit("iommufdd.core.source:Source.let_go", "self.host.release()", "pass")],
    ),
)
