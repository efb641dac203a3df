"""`python -m guest`: a Debian kernel in an emulator of its own, with this model's devices on its bus.

    python -m guest fetch    what is needed from Debian's archive, with versions and sha256
    python -m guest image    the initramfs, modules built
    python -m guest line     the command line of qemu-system-x86_64
    python -m guest boot     start it, show what it says, end with it

Exit status: 0 done, of `boot` that the guest came to its end and no result failed; 1 not; 2 the command was
wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from guest.archive import DEBIAN_KEYRING, MIRROR_VARIABLE, hash_of, machine_mirror
from guest.boot import Ending, Progress, boot, converse
from guest.failure import GuestError
from guest.machine import DEFAULT_RUNS, MachineOptions, command_line, emulator_command
from guest.store import CACHE_VARIABLE, GuestStore, Told, default_cache
from guest.wanted import WANTS

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
BOOT_TIMEOUT_S: Final = 180.0
RUNS: Final = {  # run_NAME of `init`
    "pci": "each function on the bus, as sysfs has it",
    "idxd": "load the accelerator's driver, and what it needs before",
    "block_on_fault": "each memory move may block; before dsa",
    "dsa": "a work queue of the first accelerator for the kernel's own use",
    "dma": "copy by the first channel, and compare (dma_check.tests, .bytes, .wait_ms, .channel)",
    "unbind": "let go of it, and unload the driver",
    "soft_dma": "dma by a channel in software (soft_dma.spoil=1 to 5: one that does wrong)",
}


def fetch(options: argparse.Namespace, store: GuestStore) -> int:
    mirror = options.mirror or machine_mirror()
    plans = [store.planned(want, mirror) for want in WANTS]
    if not options.json:
        for told in plans:
            print(f"{told.want.name}: {len(told.debs)} packages, {told.size / 1e6:.1f} MB in all")
    for told in plans:
        if not options.dry_run:
            store.fetch(told)
    if options.json:
        print(json.dumps({told.want.name: _told(told) for told in plans}, indent=2))
    else:
        for deb in (deb for told in plans for deb in told.debs):
            print(f"{deb.sha256}  {deb.package} {deb.version}  {deb.size}")
    return 0


def _told(told: Told) -> dict[str, Any]:
    return {"mirror": told.mirror, "bytes": told.size, "debs": [asdict(deb) for deb in told.debs]}


def image(options: argparse.Namespace, store: GuestStore) -> int:
    kernel = store.kernel()
    path = store.image(kernel)
    said = {
        "kernel": kernel.version,
        "image": str(path),
        "bytes": path.stat().st_size,
        "sha256": hash_of(path),
    }
    if options.json:
        print(json.dumps(said, indent=2))
    else:
        print(f"{said['sha256']}  {path}  {said['bytes']} bytes, Linux {kernel.version}")
    return 0


def _command(options: argparse.Namespace, store: GuestStore, *, interactive: bool) -> list[str]:
    kernel = store.kernel()
    machine = MachineOptions(
        ram_mib=options.ram,
        cpus=options.cpus,
        accelerator=options.accel,
        runs=(*options.run, "shell") if interactive else options.run,
        devices=tuple(path.absolute() for path in options.device),
        append=tuple(options.append),
        further=tuple(options.qemu),
    )
    for socket in machine.devices:
        if not socket.is_socket():
            raise GuestError(f"--device {socket}: no socket; who serves the function has to be there first")
    emulator = emulator_command(store.emulator())
    return command_line(emulator, kernel.image, store.image(kernel), machine, interactive=interactive)


def line(options: argparse.Namespace, store: GuestStore) -> int:
    command = _command(options, store, interactive=options.console)
    print(json.dumps(command) if options.json else shlex.join(command))
    return 0


def start(options: argparse.Namespace, store: GuestStore) -> int:
    with store.alone():
        command = _command(options, store, interactive=options.console)
    if options.console:
        print("Ctrl-A X ends the machine, `exit` the shell", file=sys.stderr)
        return EXIT_FAILED if converse(command) else 0
    progress = Progress(sys.stderr)
    try:
        ending = boot(command, timeout_s=options.timeout, on_line=progress)
    finally:
        progress.close()
    if options.log:
        options.log.write_text("".join(f"{line}\n" for line in ending.console.lines))
    _report(ending, as_json=options.json)
    return EXIT_FAILED if ending.complaints() else 0


def _report(ending: Ending, *, as_json: bool) -> None:
    console, complaints = ending.console, ending.complaints()
    if as_json:
        results = [asdict(result) for result in console.results]
        seconds = round(ending.seconds, 1)
        said = {"seconds": seconds, "results": results, "complaints": complaints, "said": console.said}
        print(json.dumps(said, indent=2))
        return
    for result in console.results:
        print(f"{result.status:8}{result.name:20}{result.detail}")
    for complaint in complaints:
        print(f"guest: {complaint}", file=sys.stderr)
    print(f"{ending.seconds:.1f} s from start to end")


def runs(said: str) -> tuple[str, ...]:
    names = tuple(said.split(","))
    for name in names:
        if name not in RUNS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(RUNS)}")
    return names


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m guest",
        description="A Debian kernel in an emulator of its own, with this model's devices on its bus.",
    )
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=default_cache(),
        help=f"where all of it is kept (%(default)s; {CACHE_VARIABLE})",
    )
    everywhere.add_argument(
        "--mirror",
        default="",
        metavar="URI",
        help=f"of Debian's archive (the one apt is set up for; {MIRROR_VARIABLE})",
    )
    everywhere.add_argument(
        "--keyring",
        type=Path,
        metavar="FILE",
        default=DEBIAN_KEYRING,
        help="whose signature an index needs (%(default)s)",
    )
    everywhere.add_argument("--json", action="store_true", help="what is said, for a program")
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--ram", type=int, default=256, metavar="MIB", help="of the guest (%(default)s)")
    machine.add_argument("--cpus", type=int, default=1, metavar="N", help="of the guest (%(default)s)")
    machine.add_argument(
        "--accel", default="tcg", choices=("tcg", "kvm"), help="kvm: not tried (%(default)s)"
    )
    machine.add_argument(
        "--run",
        type=runs,
        default=",".join(DEFAULT_RUNS),
        metavar="NAME,...",
        help="what the guest does, one after the other (%(default)s)",
    )
    machine.add_argument(
        "--device",
        type=Path,
        action="append",
        default=[],
        metavar="SOCKET",
        help="of a vfio-user server: a function on the guest's bus; again for one more",
    )
    machine.add_argument(
        "--append",
        action="append",
        default=[],
        metavar="WORD",
        help="on the kernel's command line, such as dma_check.tests=100",
    )
    machine.add_argument("--qemu", action="append", default=[], metavar="ARG", help="of QEMU's own")
    machine.add_argument("--console", action="store_true", help="then a shell of the guest on this terminal")
    commands = options.add_subparsers(required=True, metavar="COMMAND")
    fetching = commands.add_parser("fetch", parents=[everywhere], help="what is needed from Debian's archive")
    fetching.add_argument("--dry-run", action="store_true", help="the index alone: versions, sizes, sha256")
    fetching.set_defaults(act=fetch)
    building = commands.add_parser("image", parents=[everywhere], help="the initramfs, modules built")
    building.set_defaults(act=image)
    told = "runs:\n" + "\n".join(f"  {name:16}{what}" for name, what in RUNS.items())
    wide = argparse.RawDescriptionHelpFormatter
    printing = commands.add_parser(
        "line",
        parents=[everywhere, machine],
        help="the emulator's command line",
        epilog=told,
        formatter_class=wide,
    )
    printing.set_defaults(act=line)
    booting = commands.add_parser(
        "boot",
        parents=[everywhere, machine],
        help="start it, and end with it",
        epilog=told,
        formatter_class=wide,
    )
    booting.add_argument(
        "--timeout",
        type=float,
        default=BOOT_TIMEOUT_S,
        metavar="S",
        help="from its start to its end (%(default)g)",
    )
    booting.add_argument("--log", type=Path, metavar="FILE", help="all that is said on the console")
    booting.set_defaults(act=start)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    act: Callable[[argparse.Namespace, GuestStore], int] = options.act
    store = GuestStore(options.cache, mirror=options.mirror, keyring=options.keyring)
    try:
        with nullcontext() if act is start else store.alone():  # others may use it while a guest runs
            status = act(options, store)
        sys.stdout.flush()
        return status
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # who reads this has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("guest: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
