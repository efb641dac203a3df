"""The command line of the emulator: a q35 with the kernel and its initramfs, and what stands on its PCI bus.

RAM is a shared memfd, so that a vfio-user server is given it to reach.  The emulator is run by its own loader
with its own libraries.  It ends with its parent, and where the guest would reboot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from guest.failure import GuestError

DEFAULT_RUNS: Final = ("pci", "idxd", "dsa", "dma")
_LIBRARIES: Final = Path("usr/lib/x86_64-linux-gnu")
_FIRMWARE: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
_ANSWER_MS: Final = 60_000  # of a vfio-user server, for one message; a reset waits for DMA


@dataclass(frozen=True)
class MachineOptions:
    """`devices`: sockets of vfio-user servers; `ram_mib` of memory; `append` to the kernel's command line."""

    ram_mib: int = 256
    cpus: int = 1
    accelerator: str = "tcg"
    runs: tuple[str, ...] = DEFAULT_RUNS
    devices: tuple[Path, ...] = ()
    append: tuple[str, ...] = ()
    further: tuple[str, ...] = field(default=())  # arguments of QEMU's own


def emulator_command(root: Path) -> list[str]:
    """What starts the emulator that was unpacked in `root`."""
    libraries = root / _LIBRARIES
    loader = libraries / "ld-linux-x86-64.so.2"
    program = root / "usr/bin/qemu-system-x86_64"
    for needed in (loader, program):
        if not needed.is_file():
            raise GuestError(f"no {needed.name} among the emulator's packages")
    firmware = [argument for place in _FIRMWARE for argument in ("-L", str(root / place))]
    path = f"{libraries}:{libraries / 'pulseaudio'}"
    return [str(loader), "--library-path", path, str(program), *firmware]


def kernel_arguments(options: MachineOptions) -> str:
    words = ["console=ttyS0", "panic=-1", "printk.devkmsg=on", f"guest.run={','.join(options.runs)}"]
    for word in (*words, *options.append):
        if not word or any(character.isspace() for character in word):
            raise GuestError(f"no word for a kernel's command line: {word!r}")
    return " ".join([*words, *options.append])


def command_line(
    emulator: Sequence[str], kernel: Path, image: Path, options: MachineOptions, *, interactive: bool
) -> list[str]:
    """`interactive`: QEMU's monitor is on the same terminal, behind Ctrl-A."""
    memory = f"memory-backend-memfd,id=ram,size={options.ram_mib}M,share=on"
    return [
        *emulator,
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-run-with", "exit-with-parent=on"),
        *(
            "-accel",
            options.accelerator,
            "-cpu",
            "max",
            "-smp",
            str(options.cpus),
            "-m",
            f"{options.ram_mib}M",
        ),
        *("-object", memory, "-machine", "q35,memory-backend=ram"),
        *("-serial", "mon:stdio" if interactive else "stdio"),
        *("-kernel", str(kernel), "-initrd", str(image), "-append", kernel_arguments(options)),
        *(argument for socket in options.devices for argument in ("-device", vfio_user_device(socket))),
        *options.further,
    ]


def vfio_user_device(socket: Path) -> str:
    address = {"path": str(socket), "type": "unix"}
    return json.dumps(
        {"driver": "vfio-user-pci", "socket": address, "rombar": 0, "x-msg-timeout": _ANSWER_MS}
    )
