"""Mistakes in what areas of iommufdd show: whose memory, which part of it, with which rights, until when."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_ON_DEMAND = "iommufdd.core.ioas_on_demand:IoasOnDemand"
_PAGES = "iommufdd.core.pages:Pages"

IOMMUFDD_AREAS = (
    # -- whose memory ------------------------------------------------------------------------------------
    Plant(
        "memory-of-whichever-process",
        "Of whatever process is to be mapped, what is mapped is the first one's that an iommufd had.",
        "I28",
        [Edit("iommufdd.core.source:Sources.get", "if name == mm.cookie)", ")")],
    ),
    Plant(
        "one-process-is-not-asked",
        "An IOAS on demand is asked for a second process's memory, and maps the first one's there.",
        "I28",
        [Edit(f"{_ON_DEMAND}.enter_memory", "if self.mm_cookie not in (0, mm.cookie):", "if False:")],
    ),
    # -- which part of it --------------------------------------------------------------------------------
    Plant(
        "copied-from-the-start-of-the-area",
        "A copy from the middle of an area shows what the area begins with.",
        "I28",
        [Edit("iommufdd.core.ioas:Ioas.slices", "area.hva_of(at)", "area.hva")],
    ),
    # -- with which rights -------------------------------------------------------------------------------
    Plant(
        "writable-whatever-was-asked",
        "An area of an IOAS on demand is writable, though it was asked for to be read.",
        "I21",
        [
            Edit(
                f"{_ON_DEMAND}.enter_memory", "Area(iova, size, hva, writable)", "Area(iova, size, hva, True)"
            )
        ],
    ),
    Plant(
        "flag-of-rights-is-ignored",
        "All that is asked for is mapped to be stored to, with IOMMU_IOAS_MAP_WRITEABLE and without.",
        "I21",
        [Edit("iommufdd.service.ioas:_is_writable", "return writable", "return True")],
    ),
    Plant(
        "copied-with-more-rights",
        "Pages that were mapped to be read are copied to be stored to.",
        "I21",
        [
            Edit("iommufdd.core.ioas:Ioas.map_slices", "if writable and not pages.writable:", "if False:"),
            Edit(f"{_PAGES}._read_back", "self.writable", "True"),
        ],
    ),
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
