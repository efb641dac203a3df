"""Settings of iommufdd: where KVM and the silicon are."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from protocol.daemon import parser


@dataclass(frozen=True, slots=True)
class Settings:
    kvmd: Path
    device: Path


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    options = parser("iommufdd", "IOMMUFD and the VT-d driver: importer of exported TDPs.")
    options.add_argument("--kvmd", type=Path, required=True, metavar="PATH", help="kvmd's socket")
    options.add_argument("--device", type=Path, required=True, metavar="PATH", help="device_sim's socket")
    given = options.parse_args(argv)
    return given, Settings(given.kvmd, given.device)
