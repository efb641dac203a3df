"""Which code runs: a number over the sources that a run's figures depend on.

Runs of different code do not belong into one table, so a store is for one of them, and a cluster's workers
must have the one that sent the points.  What only reads runs (campaign, command, compare) is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("protocol", "kvmd", "iommufdd", "device_sim", "qemu_shim")
READERS = tuple(f"qemu_shim/study/{room}/" for room in ("campaign", "command", "compare"))


def code_version(files: Sequence[Path] = ()) -> str:
    """`files` have scenarios of a user's."""
    if not files:
        return product_version()
    digest = hashlib.sha256(product_version().encode())
    for path in files:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def product_version() -> str:
    return digest_of(ROOT, PACKAGES, READERS)


def digest_of(root: Path, packages: Sequence[str], left_out: tuple[str, ...] = ()) -> str:
    """Of what their files have in them, whether somebody has committed that or not."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(left_out):
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
