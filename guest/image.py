"""The initramfs: busybox, the modules and their order, and `init`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from guest.kernel import load_order
from guest.newc import CpioEntry, character_device, directory, executable, newc, plain_file

INIT: Final = Path(__file__).parent / "init"
DRIVER: Final = ("movdir64b", "idxd")  # which looks for the instruction as it loads
HELPERS: Final = ("block_on_fault", "dma_check", "soft_dma")


def entries(
    busybox: bytes, own: Mapping[str, bytes], kernels: Callable[[str], bytes]
) -> dict[str, CpioEntry]:
    """`own` modules by name, and what reads the kernel's."""

    def read(name: str) -> bytes:
        return own[name] if name in own else kernels(name)

    return {
        "init": executable(INIT.read_bytes()),
        "bin/busybox": executable(busybox),
        "dev": directory(),
        "dev/console": character_device(5, 1),
        "modules/order": plain_file("".join(f"{name}\n" for name in load_order(DRIVER, read)).encode()),
        **{f"modules/{name}.ko": plain_file(read(name)) for name in load_order((*DRIVER, *HELPERS), read)},
    }


def initramfs(busybox: bytes, own: Mapping[str, bytes], kernels: Callable[[str], bytes]) -> bytes:
    """Not compressed: the guest's CPU is the slow one."""
    return newc(entries(busybox, own, kernels))
