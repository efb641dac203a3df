"""An iommufd that is closed while a request of it is under way: nothing of what is made then is kept.

The request waits for a daemon that is stopped; the close overtakes it.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from protocol.errors import PeerError
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import System, eventually, system
from tests.kit.vmm import Vmm, bind_device, nothing_left, vm_only

Ask = Callable[[Vmm], Awaitable[object]]
PAGES = 64


async def kvm(rig: Vmm) -> object:
    assert rig.tdp_fd is not None
    return await rig.bound[0].hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)


async def paging(rig: Vmm) -> object:
    return await rig.bound[0].hwpt_alloc(rig.device_id, rig.ioas_id)


async def mapping(rig: Vmm) -> object:
    return await rig.bound[0].ioas_map(rig.ioas_id, rig.process, rig.hva, PAGE_SIZE, 1 << 32)


async def following(rig: Vmm) -> None:
    await rig.bound[0].follow_kvm(rig.ioas_id, rig.vm)


# What is asked, on an IOAS on demand or not, who is stopped, and whether the IOAS has memory before.
CASES: list[tuple[Ask, bool, str, bool]] = [
    (kvm, False, "kvmd", False),
    (kvm, False, "device_sim", False),
    (paging, False, "kvmd", True),
    (paging, False, "device_sim", True),
    (paging, True, "device_sim", True),
    (mapping, False, "kvmd", False),
    (mapping, True, "kvmd", False),
    (mapping, False, "device_sim", False),
    (mapping, True, "device_sim", False),
    (mapping, True, "kvmd", True),
    (following, True, "kvmd", False),
]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value))


async def close_under(host: Host, running: System, rig: Vmm, ask: Ask, stopped: str) -> None:
    """Ask; close the iommufd once the request waits for who is stopped; and let that one go on."""
    running.signal(stopped, signal.SIGSTOP)
    try:
        async with trio.open_nursery() as nursery:

            async def asking() -> None:
                with suppress(PeerError):
                    await ask(rig)

            nursery.start_soon(asking)
            for _ in range(3):  # it is read in one turn of iommufdd, and asks in that turn
                await host.iommufdd.stats()
            rig.bound[0].close()
            await eventually(host.iommufdd.stats, lambda s: s["devices_bound"] == 0, "the close is heard")
            running.signal(stopped, signal.SIGCONT)
    finally:
        running.signal(stopped, signal.SIGCONT)


@pytest.mark.parametrize(("ask", "on_demand", "stopped", "mapped"), CASES, ids=named)
async def test_nothing_is_kept_of_what_an_iommufd_made_when_it_was_closed(
    ask: Ask, on_demand: bool, stopped: str, mapped: bool
) -> None:
    """HWPT_ALLOC most of all: the HWPT would have an owner that nobody can close any more."""
    with system() as running:
        async with connect_host(running.directory) as host:
            async with vm_only(host) as rig:  # what is opened once and kept
                await bind_device(rig)
                rig.tdp_fd = await rig.vm.create_tdp_fd()
                await kvm(rig)
                rig.ioas_id = await rig.bound[0].ioas_alloc(on_demand=True)
                await mapping(rig)
                await paging(rig)
            before = running.all_fds()
            async with vm_only(host) as rig:
                rig.tdp_fd = await rig.vm.create_tdp_fd()
                await bind_device(rig)
                rig.ioas_id = await rig.bound[0].ioas_alloc(on_demand=on_demand)
                if mapped:
                    await rig.bound[0].ioas_map(rig.ioas_id, rig.process, rig.hva, PAGES * PAGE_SIZE, 0)
                await close_under(host, running, rig, ask, stopped)
                await eventually(host.iommufdd.stats, lambda s: s["hwpts"] == [], "no HWPT is left")
                await eventually(
                    host.kvmd.stats,
                    lambda s: not s["memory"]["pinned_pages"] and not s["vms"][-1]["importers"],
                    "nothing is pinned or imported",
                )
            await nothing_left(host)
            running.wait_closed(before)
