"""Mistakes in iommufdd's areas that are pinned whole: their pages, the files these are of, and who pays."""

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
        "I14-file-is-never-closed",
        "Nobody shows a file's pages any more, and the host keeps it open.",
        "I14",
        [Edit("iommufdd.core.pages:Pages.put", "if self.file:", "if False:")],
    ),
)
