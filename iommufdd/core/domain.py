"""A second-stage domain: a root, its width, the id it is cached under, and what a unit must have to walk it.

Models struct dmar_domain as far as second-stage translation needs it [RFC 19/42], [RFC 20/42].  A domain does
not change when it is attached (RFC-65): every unit either can walk it as it is, or is refused (R15, R16).
The same domain id serves behind every unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from protocol.hw.caps import Cap, Ecap
from protocol.hw.pasid_entry import AW_OF_LEVEL, PasidEntry, Pgtt
from protocol.pt.geometry import address_bits
from protocol.units import Hpa, Level

Need = tuple[bool, str]  # is it there; what is missing if not


@dataclass(frozen=True, slots=True)
class Domain:
    """`did` tags everything a unit caches of it."""

    COHERENT_WALKS: ClassVar[bool] = False  # does nobody flush cache lines after a store?

    root: Hpa
    level: Level
    did: int
    max_huge_page_level: Level  # of its leaves

    @property
    def width(self) -> int:
        """Bits of an address it translates."""
        return address_bits(self.level)

    def pasid_entry(self, ecap: Ecap) -> PasidEntry:
        """Second stage only, snooping enforced, no accessed or dirty bits [RFC 19/42]."""
        return PasidEntry(
            present=True,
            aw=AW_OF_LEVEL[self.level],
            pgtt=Pgtt.SECOND_STAGE,
            ss_ptr=self.root,
            did=self.did,
            pwsnp=bool(ecap.smpwc),
            pgsnp=True,
        )

    def what_is_missing(self, cap: Cap, ecap: Ecap) -> str | None:
        """Why this unit cannot walk the table, all reasons, or None."""
        return "; ".join(why for met, why in self._needs(cap, ecap) if not met) or None

    def _needs(self, cap: Cap, ecap: Ecap) -> tuple[Need, ...]:
        levels, huge = sorted(cap.levels), self.max_huge_page_level
        return (
            (ecap.smts, "no scalable mode (ECAP.SMTS), so no PGSNP"),
            (ecap.sc, "no snoop control (ECAP.SC): non-coherent DMA could not be prevented"),
            (ecap.ssts, "no second stage (ECAP.SSTS)"),
            (self.level in cap.levels, f"a root of {self.level} levels (CAP.SAGAW has {levels})"),
            # Widths with widths: the series compared an agaw with a width, and never failed (defect B-17).
            (self.width <= cap.mgaw, f"{self.width} address bits (CAP.MGAW {cap.mgaw})"),
            (
                ecap.smpwc or not self.COHERENT_WALKS,
                "page walks are not coherent (ECAP.SMPWC): KVM does not flush cache lines",
            ),
            (
                huge <= cap.max_huge_page_level,
                f"leaves of level {huge} (CAP.SSLPS has {cap.max_huge_page_level})",
            ),
            (not cap.cm, "caching mode (CAP.CM): nobody says when an entry becomes present"),
        )
