"""Mistakes in what areas of iommufdd show: whose memory, which part of it, with which rights, until when."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_PAGES = "iommufdd.core.pages:Pages"

IOMMUFDD_AREAS = (
    # -- until when --------------------------------------------------------------------------------------
    Plant(
        "R21-a-file-s-area-goes-unflushed",
        "An area of a file's pages goes before the units have forgotten them.",
        "R21",
        [Edit(f"{_PAGES}._hide", "await hwpt.give_up()", "await hwpt.give_up() if not self.file else None")],
        races=["R21", "R4"],
    ),
    Plant(
        "R21-shown-elsewhere-and-unflushed",
        "An area whose pages another one shows goes before the units have forgotten it: they stay pinned.",
        "R21",
        [
            Edit(
                f"{_PAGES}._hide",
                "await hwpt.give_up()",
                "await hwpt.give_up() if len(self.shown) == 1 else None",
            )
        ],
        races=["R21"],
    ),
)
