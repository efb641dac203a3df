"""Settings of iommufdd: where KVM and the silicon are, and what stands for Kconfig and policy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from iommufdd.core.fault_policy import FaultPolicy, Policy
from protocol.options import bytes_of, parser
from protocol.units import GIB, MIB, TIB

MAX_PREMAP = 512  # [IOPF 0/8]


@dataclass(frozen=True, slots=True)
class IommufddSettings:
    kvmd: Path
    device: Path
    kvm_hwpt: bool = True
    table_bytes: int = GIB
    premap_pages: int = 1
    fault_policy: FaultPolicy = field(default_factory=FaultPolicy)
    started_with: tuple[str, ...] = ()


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, IommufddSettings]:
    options = parser("iommufdd", "IOMMUFD and the VT-d driver: importer of exported TDPs.")
    options.add_argument("--kvmd", type=Path, required=True, metavar="PATH", help="kvmd's --importer-socket")
    options.add_argument(
        "--device", type=Path, required=True, metavar="PATH", help="device_sim's --driver-socket"
    )
    options.add_argument(
        "--no-kvm-hwpt", action="store_true", help="as built without IOMMUFD_KVM_HWPT: no KVM HWPTs"
    )
    options.add_argument(
        "--fault-policy",
        type=Policy,
        default=Policy.DECLARED,
        metavar="|".join(Policy),
        help="which devices may meet an absent page (declared: those that say they survive it everywhere)",
    )
    options.add_argument(
        "--may-fault", action="append", default=[], metavar="BB:DD.F", help="one device of the allow-list"
    )
    options.add_argument(
        "--table-bytes",
        type=bytes_of,
        default=GIB,
        metavar="SIZE",
        help="room for the tables of IOASes, which are sparse (1G: 510 GiB in pages of 4 KiB)",
    )
    options.add_argument(
        "--premap-pages",
        type=int,
        default=1,
        choices=range(1, MAX_PREMAP + 1),
        metavar=f"1..{MAX_PREMAP}",
        help="pages an IO page fault maps in an IOAS on demand, the one that faulted first (1)",
    )
    given = options.parse_args(argv)
    if given.table_bytes % MIB or not MIB <= given.table_bytes <= TIB:
        options.error(f"--table-bytes {given.table_bytes}: whole MiB, 1M to 1T")
    policy = FaultPolicy(given.fault_policy, frozenset(given.may_fault))
    sizes = given.table_bytes, given.premap_pages
    started_with = options.started_with(argv)
    return given, IommufddSettings(
        given.kvmd, given.device, not given.no_kvm_hwpt, *sizes, policy, started_with
    )
