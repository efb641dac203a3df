"""The front door: what a scenario of yours is written with.

    # One page, swapped out before it is copied.
    from qemu_shim.api import Context, scenario

    @scenario()
    async def swapped(ctx: Context) -> None:
        guest = await ctx.boot()
        src, dst = guest.pages(2)
        await guest.write(src, b"hello")
        await guest.swap_out(src)
        await guest.copy(dst, src)
        ctx.expect_equal(await guest.read(dst, 5), b"hello", "the copy")

`qemu-shim run FILE.py` plays it; `qemu-shim compare FILE.py` plays it on every design and prices what it
counted; `qemu-shim campaign FILE.py --seeds 0..9 --out DIR` plays it many times.  What is named here is
stable, and a test says when it changes.  What lies behind (`guest.machine`, `ctx.host`) is the VMM itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from protocol.errors import UapiError
from protocol.units import GIB, KIB, MIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import OutOfGuestMemory
from qemu_shim.scenarios.context import DRIVER_PAGES, KERNEL_BYTES, Context, Wishes
from qemu_shim.scenarios.counters import Counters
from qemu_shim.scenarios.guest import DmaDevice, DmaFailed, Guest, QueueWish
from qemu_shim.scenarios.scenario import Param, Play, Scenario
from qemu_shim.vmm.daemons import DAEMONS, DEVICE_SIM
from qemu_shim.vmm.designs import DESIGNS, Design, RamSlot, Refused, Stroke
from qemu_shim.vmm.machine import GuestCpu
from qemu_shim.vmm.migrator import Migrator

__all__ = (
    "DESIGNS",
    "DRIVER_PAGES",
    "GIB",
    "KERNEL_BYTES",
    "KIB",
    "MIB",
    "PAGE_SIZE",
    "Context",
    "Counters",
    "Design",
    "DmaDevice",
    "DmaFailed",
    "Guest",
    "GuestCpu",
    "IdxdWorkQueue",
    "Migrator",
    "OutOfGuestMemory",
    "Param",
    "QueueWish",
    "RamSlot",
    "Refused",
    "Scenario",
    "Stroke",
    "UapiError",
    "Wishes",
    "scenario",
)


def scenario(
    *,
    name: str = "",
    devices: int = 1,
    options: Mapping[str, Sequence[str]] | None = None,
    designs: Sequence[str] = (),
    **params: Param,
) -> Callable[[Play], Scenario]:
    """Makes a scenario of the coroutine that plays it.

    Its name is the function's, with dashes, unless it is given; its help the function's docstring, or its
    file's.  Each of `params` becomes an option of the command and a key of `ctx.params`.  It is played on
    daemons with so many `devices` and these `options`, by the daemon's name: {"kvmd": ["--no-pml"]}; and on
    `designs`, none named: any.  TypeError: one of `params` is no Param, or no daemon has that name.
    """
    _check(params, options or {})

    def made(play: Play) -> Scenario:
        story = (play.__doc__ or sys.modules[play.__module__].__doc__ or "").strip()
        wanted = {daemon: tuple(words) for daemon, words in (options or {}).items()}
        if devices > 1:
            wanted[DEVICE_SIM.name] = (*wanted.get(DEVICE_SIM.name, ()), "--devices", str(devices))
        called = name or getattr(play, "__name__", "scenario").replace("_", "-")
        summary = story.partition("\n")[0].rstrip(".")
        return Scenario(called, summary, play, params, wanted, tuple(designs), help=story)

    return made


def _check(params: Mapping[str, object], options: Mapping[str, Sequence[str]]) -> None:
    """Whoever writes a file may run no type checker."""
    for name, param in params.items():
        if not isinstance(param, Param):
            raise TypeError(
                f"{name}={param!r}: a parameter is a Param(default, low, high, help), and no other option of "
                "scenario() is called so"
            )
    daemons = [spec.name for spec in DAEMONS]
    for daemon in options:
        if daemon not in daemons:
            raise TypeError(f"options for {daemon!r}: there is no such daemon, only {', '.join(daemons)}")
