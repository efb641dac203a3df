"""Settings of kvmd: how big the host is and what its CPUs can do."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from kvmd.core.host import CpuFeatures, Obstacle
from kvmd.core.mm.frames import Reuse
from kvmd.core.tables.zap import COMPILED_BATCH, ZAP_BATCH
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_END, LOW_RAM_START
from protocol.options import bytes_of, parser
from protocol.units import GIB, MIB, Level

_PAGE_LEVELS = {"4K": 1, "2M": 2, "1G": 3}
MAX_RAM = 1 << 45


@dataclass(frozen=True, slots=True)
class Settings:
    ram_bytes: int
    table_bytes: int
    features: CpuFeatures
    frame_tags: bool
    obstacles: frozenset[Obstacle] = frozenset()
    memlock: int | None = None  # bytes; None: no limit
    importer_socket: Path | None = None
    admin_socket: Path | None = None
    trust_importers: bool = False
    started_with: tuple[str, ...] = ()
    reuse: Reuse = Reuse.SOON  # of frames that were given up
    zap_batch: int | None = None
    seq_start: int = 0  # of the invalidations that each VM counts


def _add_ram(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--ram", type=bytes_of, default=64 * GIB, metavar="SIZE", help="host RAM for frames (64G)"
    )
    options.add_argument(
        "--table-ram",
        type=bytes_of,
        default=LOW_RAM_END - LOW_RAM_START,
        metavar="SIZE",
        help="host RAM for page tables (2047M, all below 2 GiB)",
    )


def _add_doors(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--importer-socket",
        type=Path,
        metavar="PATH",
        help="socket for the IOMMU's driver, which is lent the memory of all VMs: keep it from clients",
    )
    options.add_argument(
        "--admin-socket", type=Path, metavar="PATH", help="socket to inspect and dump any VM by its number"
    )
    options.add_argument(
        "--trust-importers", action="store_true", help="whoever connects to --socket may import as well"
    )


def _check_sizes(options: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.ram % GIB or not GIB <= given.ram <= MAX_RAM:
        options.error(f"--ram {given.ram}: whole GiB, 1G to 32T")
    if given.table_ram % MIB or not MIB <= given.table_ram <= LOW_RAM_END - LOW_RAM_START:
        options.error(f"--table-ram {given.table_ram}: whole MiB, 1M to 2047M")
    if given.zap_batch is not None and given.zap_batch < 1:
        options.error(f"--zap-batch {given.zap_batch}: at least 1")
    if HIGH_RAM_START + given.ram > 1 << given.maxphyaddr:
        options.error(f"--ram {given.ram}: does not fit in {given.maxphyaddr} physical address bits")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    options = parser("kvmd", "KVM and the host's memory management: sole writer of the shared page table.")
    _add_ram(options)
    options.add_argument("--maxphyaddr", type=int, default=46, choices=range(36, 53), metavar="36..52")
    options.add_argument("--ept-levels", type=int, default=4, choices=(4, 5))
    options.add_argument("--max-page", default="1G", choices=tuple(_PAGE_LEVELS), help="largest EPT leaf")
    options.add_argument("--no-ept-ad-bits", action="store_true")
    options.add_argument("--no-pml", action="store_true", help="dirty logging by write protection alone")
    options.add_argument(
        "--address-spaces", type=int, default=2, choices=(1, 2), help="1: a KVM built without SMM"
    )
    options.add_argument(
        "--no-dirty-ring-bitmap",
        action="store_true",
        help="no KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: a VM with a dirty ring cannot export its TDP",
    )
    options.add_argument(
        "--cannot-export",
        action="append",
        default=[],
        type=Obstacle,
        metavar="WHY",
        help="answer KVM_CREATE_TDP_FD as a KVM that cannot: " + ", ".join(each.value for each in Obstacle),
    )
    options.add_argument("--memlock", type=bytes_of, metavar="SIZE", help="may be pinned (unlimited)")
    options.add_argument(
        "--zap-batch",
        type=int,
        metavar="N",
        help="leaves that a zap clears and flushes before others get a turn "
        f"({ZAP_BATCH}; {COMPILED_BATCH} by compiled code)",
    )
    options.add_argument(
        "--no-frame-tags",
        action="store_true",
        help="do not tag frames with their owner (a debug aid: devices check that they touch none given up)",
    )
    _add_doors(options)
    given = options.parse_args(argv)
    _check_sizes(options, given)
    features = CpuFeatures(
        maxphyaddr=given.maxphyaddr,
        ept_levels=given.ept_levels,
        max_page_level=Level(_PAGE_LEVELS[given.max_page]),
        ept_ad_bits=not given.no_ept_ad_bits,
        pml=not (given.no_pml or given.no_ept_ad_bits),
        address_spaces=given.address_spaces,
        dirty_ring_with_bitmap=not given.no_dirty_ring_bitmap,
    )
    obstacles = frozenset(given.cannot_export)
    ram, tags = (given.ram, given.table_ram), not given.no_frame_tags
    doors = given.importer_socket, given.admin_socket, given.trust_importers
    started_with = options.started_with(argv)
    return given, Settings(
        *ram, features, tags, obstacles, given.memlock, *doors, started_with, zap_batch=given.zap_batch
    )
