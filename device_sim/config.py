"""Settings of device_sim: what each remapping unit can do, and which devices sit behind which.

`--unit 1:no-psi,mamv=3` and `--device 2:unit=1,no-pri` change one of several: the same options without
their dashes, separated by commas.  Everything not named there is as for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from device_sim.core.traits import (
    PRI_CAPACITY,
    DeviceTraits,
    InvalidateCompletion,
    Traits,
    UnitTraits,
    capabilities,
)
from protocol.hw.dsa import FAULT_CAPABILITIES
from protocol.options import parser

MAX_DEVICES = 16
MAX_UNITS = 4
MAX_AT_ONCE = 256
# Bus 0x6a, devices 1, 2, ... function 0: where SPR has its accelerators.
FIRST_RID = 0x6A08
RID_STEP = 8
# What an option takes away from the registers of a unit.
LACKS = {
    "no_snoop_control": "sc",
    "no_scalable_mode": "smts",
    "no_walk_coherency": "smpwc",
    "no_second_stage": "ssts",
    "no_first_stage": "fsts",
    "no_device_tlb": "dt",
    "no_prs": "prs",
    "no_psi": "psi",
}


@dataclass(frozen=True, slots=True)
class DeviceSimSettings:
    units: list[UnitTraits]
    devices: list[DeviceTraits]
    driver_socket: Path | None = None
    started_with: tuple[str, ...] = ()


def _add_unit_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--levels", type=int, default=4, choices=(4, 5), help="second-stage levels (SAGAW)")
    options.add_argument("--max-page", default="1G", choices=("4K", "2M", "1G"), help="largest leaf (SSLPS)")
    options.add_argument("--haw", type=int, default=46, choices=range(36, 53), metavar="36..52")
    options.add_argument(
        "--mgaw", type=int, choices=range(36, 58), metavar="36..57", help="address bits (those of its levels)"
    )
    options.add_argument("--mamv", type=int, default=18, choices=range(64), metavar="0..63")
    options.add_argument(
        "--descriptors-at-once",
        type=int,
        choices=range(1, MAX_AT_ONCE + 1),
        metavar=f"1..{MAX_AT_ONCE}",
        help="executed from the invalidation queue before devices behind the unit have a turn (all)",
    )
    options.add_argument("--caching-mode", action="store_true", help="CAP.CM: KVM domains are refused")
    for option, field in LACKS.items():
        options.add_argument(
            f"--{option.replace('_', '-')}", action="store_true", help=f"without {field.upper()}"
        )


def _add_device_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--fault-capability",
        default="full",
        choices=FAULT_CAPABILITIES,
        help="where a device asks for a page that is absent: partial, not for completion records and batch "
        "lists, which are lost; none, nowhere, it has no page requests",
    )
    options.add_argument(
        "--invalidate-completion",
        default=InvalidateCompletion.IN_TIME,
        choices=[each.value for each in InvalidateCompletion],
        help="when a device completes invalidations of its device TLB: late, every other one only after the "
        "unit's time-out (ITE, then ICE); never, until the driver takes it off the bus",
    )
    options.add_argument("--no-pasid", action="store_true")
    options.add_argument("--no-ats", action="store_true")
    options.add_argument("--no-pri", action="store_true")
    options.add_argument("--pri-on", action="store_true", help="page requests are on before anybody attaches")
    options.add_argument(
        "--pri-capacity",
        type=int,
        default=PRI_CAPACITY,
        choices=range(1, PRI_CAPACITY + 1),
        metavar=f"1..{PRI_CAPACITY}",
        help="page requests that may be outstanding",
    )
    options.add_argument("--pasid-optional", action="store_true", help="responses need not carry the PASID")


def _placed(options: argparse.ArgumentParser) -> None:
    """What only one device can have."""
    options.add_argument("--unit", type=int, default=0)
    options.add_argument("--group", type=int, default=None)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, DeviceSimSettings]:
    options = parser("device-sim", "DSA-like devices and the VT-d remapping units before them.")
    options.add_argument(
        "--driver-socket",
        type=Path,
        required=True,
        metavar="PATH",
        help="socket for the IOMMU's driver, which has the remapping units: keep it from clients",
    )
    options.add_argument("--devices", type=int, default=1, choices=range(1, MAX_DEVICES + 1), metavar="1..16")
    options.add_argument("--units", type=int, default=1, choices=range(1, MAX_UNITS + 1), metavar="1..4")
    options.add_argument(
        "--unit", action="append", default=[], metavar="N:OPTION,...", help="change one unit"
    )
    options.add_argument(
        "--device", action="append", default=[], metavar="N:OPTION,...", help="change one device"
    )
    _add_unit_options(options)
    _add_device_options(options)
    given = options.parse_args(argv)
    one_unit = argparse.ArgumentParser(prog="device-sim --unit N:", add_help=False)
    _add_unit_options(one_unit)
    one_device = argparse.ArgumentParser(prog="device-sim --device N:", add_help=False)
    _add_device_options(one_device)
    _placed(one_device)
    own = copy(given)
    del own.unit
    units = [_unit(options) for options in _each(one_unit, given, given.units, given.unit)]
    devices = [
        _device(n, options) for n, options in enumerate(_each(one_device, own, given.devices, given.device))
    ]
    for device in devices:
        if not 0 <= device.unit < len(units):
            options.error(f"device at {device.rid:#x}: there is no unit {device.unit}")
    return given, DeviceSimSettings(units, devices, given.driver_socket, options.started_with(argv))


def _each(
    one: argparse.ArgumentParser, for_all: argparse.Namespace, count: int, changes: Sequence[str]
) -> list[argparse.Namespace]:
    """`count` sets of options, all alike but for the changes."""
    each = [copy(for_all) for _ in range(count)]
    for change in changes:
        number, _, rest = change.partition(":")
        if not number.isdecimal() or int(number) >= count:
            one.error(f"{change!r}: numbers are 0 to {count - 1}")
        one.parse_args([f"--{option}" for option in rest.split(",")], each[int(number)])
    for given in each:
        one.parse_args([], given)  # what only `one` knows gets its default
    return each


def _unit(given: argparse.Namespace) -> UnitTraits:
    lacking = {field: 0 for option, field in LACKS.items() if getattr(given, option)}
    width = {} if given.mgaw is None else {"mgaw": given.mgaw}
    cap, ecap = capabilities(
        levels=given.levels,
        max_page=given.max_page,
        mamv=given.mamv,
        cm=int(given.caching_mode),
        **lacking,
        **width,
    )
    return UnitTraits(cap, ecap, given.haw, given.descriptors_at_once)


def _device(number: int, given: argparse.Namespace) -> DeviceTraits:
    capability = given.fault_capability
    traits = Traits(
        pasid=not given.no_pasid,
        ats=not given.no_ats,
        pri=not given.no_pri and capability != "none",
        pri_on=given.pri_on and capability != "none",
        pri_capacity=given.pri_capacity,
        invalidate_completion=InvalidateCompletion(given.invalidate_completion),
        control_faults=capability == "full",
    )
    return DeviceTraits(
        rid=FIRST_RID + RID_STEP * number,
        unit=given.unit,
        group=number if given.group is None else given.group,
        function=traits,
        pasid_required=not given.pasid_optional,
        fault_capability=capability,
    )
