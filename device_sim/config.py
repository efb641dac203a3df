"""Settings of device_sim: what the remapping unit can do, and which devices sit behind it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from protocol.daemon import parser
from protocol.hw.caps import Cap, Ecap, make_cap, make_ecap

MAX_DEVICES = 16
# Bus 0x6a, devices 1, 2, ... function 0: where SPR has its accelerators.
FIRST_RID = 0x6A08
RID_STEP = 8


@dataclass(frozen=True, slots=True)
class Settings:
    cap: Cap
    ecap: Ecap
    haw: int
    devices: int

    @property
    def rids(self) -> list[int]:
        return [FIRST_RID + RID_STEP * n for n in range(self.devices)]


def capabilities(*, levels: int, max_page: str, snoop_control: bool = True) -> tuple[Cap, Ecap]:
    """A unit in scalable mode that a KVM domain can use, less what the arguments take away."""
    cap = make_cap(
        nd=6,
        sagaw=0b0100 if levels == 4 else 0b1100,
        mgaw=48 if levels == 4 else 57,
        sslps={"4K": 0, "2M": 1, "1G": 3}[max_page],
        psi=1,
        mamv=18,
        nfr=1,
        dwd=1,
        drd=1,
    )
    ecap = make_ecap(
        c=1, qi=1, dt=1, sc=int(snoop_control), prs=1, pasid=1, pss=20, pds=1, smts=1, ssts=1, fsts=1, smpwc=1
    )
    return cap, ecap


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    options = parser("device-sim", "DSA-like devices and the VT-d remapping unit before them.")
    options.add_argument("--devices", type=int, default=1, choices=range(1, MAX_DEVICES + 1), metavar="1..16")
    options.add_argument("--levels", type=int, default=4, choices=(4, 5), help="second-stage levels (SAGAW)")
    options.add_argument("--max-page", default="1G", choices=("4K", "2M", "1G"), help="largest leaf (SSLPS)")
    options.add_argument("--no-snoop-control", action="store_true", help="a unit KVM domains are refused on")
    options.add_argument("--haw", type=int, default=46, choices=range(36, 53), metavar="36..52")
    given = options.parse_args(argv)
    cap, ecap = capabilities(
        levels=given.levels, max_page=given.max_page, snoop_control=not given.no_snoop_control
    )
    return given, Settings(cap, ecap, given.haw, given.devices)
