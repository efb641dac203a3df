"""Which of Debian's packages make a guest, and where they come from.

The kernel is Debian 12's, whose idxd works on this model, with what modules for it are built from; the
emulator comes from a newer suite, since Debian 12's has no vfio-user client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Want:
    """Packages of some suites with all that they depend on, and of these the ones that are kept."""

    name: str
    suites: tuple[str, ...]
    packages: tuple[str, ...]
    kept: tuple[str, ...] = ("*",)  # patterns of names
    preferred: str = ""  # the suite whose versions win, as apt's target release


EMULATOR: Final = Want(
    "emulator", ("trixie", "trixie-backports"), ("qemu-system-x86",), preferred="trixie-backports"
)
# The image's and the headers' dependencies are a whole system and a compiler: not kept.
KERNEL: Final = Want(
    "kernel",
    ("bookworm", "bookworm-updates"),
    ("linux-image-amd64", "linux-headers-amd64", "busybox-static"),
    kept=("linux-image-[0-9]*", "linux-headers-[0-9]*", "linux-kbuild-*", "busybox-static"),
)
WANTS: Final = (EMULATOR, KERNEL)
