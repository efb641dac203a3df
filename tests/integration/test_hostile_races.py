"""Objects that die, or are asked for something else, while a request of theirs sleeps."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from protocol.errors import PeerError, UapiError
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Channel
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.process import Uffd
from tests.kit.daemons import System, eventually, system
from tests.kit.vmm import Vmm, bare_vm, bind_device, nothing_left, vm_only
from tests.kit.wire_importer import WireImporter

SIZE = 16 * PAGE_SIZE
GPA = 1 << 32
RING_BYTES, RING_ROOM = 1 << 14, 1024 - 576  # entries, less what the guest may still push
F_RESET = 2
RING_FULL = 31
DIRTY_LOG_RING = 192


class Requests:
    """Requests on their way, and what became of them: a result, an errno, or `gone`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.ended: dict[str, Any] = {}

    def begin(self, name: str, asking: Awaitable[Any]) -> None:
        async def run() -> None:
            try:
                self.ended[name] = await asking
            except UapiError as error:
                self.ended[name] = errno.errorcode[error.errno]
            except PeerError:
                self.ended[name] = "gone"

        self._nursery.start_soon(run)

    async def end(self, *names: str) -> list[Any]:
        async def look() -> dict[str, Any]:
            return self.ended

        await eventually(look, lambda ended: all(name in ended for name in names), f"{names} end")
        return [self.ended[name] for name in names]


@asynccontextmanager
async def asked() -> AsyncIterator[Requests]:
    async with trio.open_nursery() as nursery:
        yield Requests(nursery)


async def kvmd_sees(running: System, closed: int, close: Callable[[], None], name: str = "kvmd") -> None:
    """Have `close` hang up on that many of the daemon's fds, and wait until it knows."""

    async def fds() -> int:
        return running.fds(name)

    before = running.fds(name)
    close()
    await eventually(fds, lambda now: now <= before - closed, f"{name} hears of {closed} fds less")


async def sent(*channels: Channel) -> None:
    """What was asked of them has left us."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    for channel in channels:
        channel.flush()


async def watched(rig: Vmm, size: int = PAGE_SIZE) -> tuple[int, Uffd]:
    """Memory whose first touch sleeps until a userfaultfd answers."""
    hva = await rig.process.mmap(size)
    uffd = await rig.process.userfaultfd()
    rig.extra.append(uffd)
    await uffd.register(hva, size, "missing")
    return hva, uffd


async def deaf_importer(rig: Vmm) -> WireImporter:
    """It walks the exported table and acks nothing until it is told to."""
    rig.tdp_fd = await rig.vm.create_tdp_fd()
    importer = await WireImporter.of(rig.host, rig.tdp_fd, ack=False)
    await importer.register()
    return importer


def ack_from_now_on(importer: WireImporter) -> None:
    importer.ack = True
    importer.ack_all()


# -- the VM goes -------------------------------------------------------------------------------------------


async def test_the_vm_closes_while_its_export_sleeps_in_the_callers_memory(
    host: Host, shared_system: System
) -> None:
    async with vm_only(host) as rig, asked() as requests:
        argp, uffd = await watched(rig)
        requests.begin("export", rig.vm.create_tdp_fd(argp=argp))
        await uffd.next_event()
        await kvmd_sees(shared_system, 2, rig.close_vm)
        await uffd.copy(argp, b"\0")
        await eventually(host.kvmd.stats, lambda s: s["vms"] == [], "the VM is destroyed")


async def test_the_vm_closes_while_its_dirty_log_waits_for_an_ack(host: Host, shared_system: System) -> None:
    async with vm_only(host) as rig, asked() as requests:
        hva = await rig.process.mmap(SIZE)
        await rig.vm.set_user_memory_region(1, GPA, SIZE, hva, flags=1)
        importer = await deaf_importer(rig)
        await rig.vcpu.run([("w", GPA, b"dirty")])
        requests.begin("get", rig.vm.get_dirty_log(1, rig.hva))
        await importer.wait_told()
        await kvmd_sees(shared_system, 2, rig.close_vm)
        rig.close_tdp_fd()
        assert await requests.end("get") == ["gone"]
        assert (await host.kvmd.stats())["vm_count"] == 1
        ack_from_now_on(importer)
        importer.end_lease()
        await eventually(host.kvmd.stats, lambda s: s["vms"] == [], "the VM is destroyed")
        importer.close()


# -- the process goes --------------------------------------------------------------------------------------


async def test_the_process_exits_while_everything_sleeps(host: Host, shared_system: System) -> None:
    """vCPU, device and copies in a userfaultfd; mremap in a notifier; fork, mmap and the exit behind it."""
    async with vm_only(host) as rig, asked() as requests:
        process = rig.process
        hva, uffd = await watched(rig, SIZE)
        await rig.vm.set_user_memory_region(1, GPA, SIZE, hva, flags=1)
        importer = await deaf_importer(rig)
        await rig.vcpu.run([("w", 0, b"mapped")])
        fault = {"mm": LINUX.cookie_of(process._fd), "gfn": (GPA >> 12) + 1, "read": True}
        requests.begin("run", rig.vcpu.run([("w", GPA, b"x")]))
        requests.begin("io", importer.channel.ask("TDP_FAULT", {**fault, "write": True, "exec": False}))
        requests.begin("log", rig.vm.get_dirty_log(1, hva + 2 * PAGE_SIZE))
        assert {(await uffd.next_event())[0] - hva for _ in range(3)} == {0, PAGE_SIZE, 2 * PAGE_SIZE}
        requests.begin("mremap", process.mremap(rig.hva, PAGE_SIZE, PAGE_SIZE, hva + (1 << 40)))
        await importer.wait_told()
        requests.begin("fork", process.fork())
        requests.begin("mmap", process.mmap(PAGE_SIZE))
        requests.begin("event", uffd.next_event())
        await sent(process._channel)
        await kvmd_sees(shared_system, 1, process.close)
        assert await requests.end("mremap", "fork", "mmap") == ["gone"] * 3
        ack_from_now_on(importer)
        ran, io, log = await requests.end("run", "io", "log")
        assert (ran.errno, io, log) == (errno.EFAULT, "EFAULT", "EFAULT")
        assert await host.kvmd.violations() == []
        uffd.close()
        assert await requests.end("event") == ["gone"]
        importer.close()


async def test_a_userfaultfd_of_a_process_that_exited_is_told_so(host: Host, shared_system: System) -> None:
    async with vm_only(host) as rig:
        hva, uffd = await watched(rig)
        await kvmd_sees(shared_system, 1, rig.process.close)
        late = [
            (uffd.register(hva, PAGE_SIZE, "missing"), errno.ENOMEM),
            (uffd.unregister(hva, PAGE_SIZE), errno.ENOMEM),
            (uffd.copy(hva, b"x"), errno.ESRCH),
            (uffd.zeropage(hva, PAGE_SIZE), errno.ESRCH),
            (uffd.writeprotect(hva, PAGE_SIZE, on=True), errno.ESRCH),
        ]
        for asking, number in late:
            with pytest.raises(UapiError) as caught:
                await asking
            assert caught.value.errno == number


# -- the mapping, the file, the userfaultfd go --------------------------------------------------------------


@pytest.mark.parametrize("how", ["munmap", "mprotect", "unregister", "close"])
async def test_a_vcpu_that_sleeps_in_a_userfaultfd_wakes_when_its_reason_goes(host: Host, how: str) -> None:
    async with vm_only(host) as rig, asked() as requests:
        hva, uffd = await watched(rig)
        await rig.vm.set_user_memory_region(1, GPA, PAGE_SIZE, hva)
        requests.begin("run", rig.vcpu.run([("w", GPA, b"x")]))
        await uffd.next_event()
        if how == "munmap":
            await rig.process.munmap(hva, PAGE_SIZE)
        elif how == "mprotect":
            await rig.process.mprotect(hva, PAGE_SIZE, "r")
            assert "run" not in requests.ended, "mprotect wakes nobody"
            await uffd.zeropage(hva, PAGE_SIZE)
        elif how == "unregister":
            await uffd.unregister(hva, PAGE_SIZE)
        else:
            uffd.close()
        (ran,) = await requests.end("run")
        assert ran.errno == (errno.EFAULT if how in ("munmap", "mprotect") else 0)


async def test_a_write_behind_a_truncation_outlives_the_files_last_fd_and_mapping(
    host: Host, shared_system: System
) -> None:
    async with vm_only(host) as rig, asked() as requests:
        file = await rig.process.memfd("doomed", SIZE)
        hva = await rig.process.mmap(SIZE, kind="file_shared", file=file)
        await rig.vm.set_user_memory_region(1, GPA, SIZE, hva)
        importer = await deaf_importer(rig)
        await rig.vcpu.run([("w", GPA, b"x")])
        requests.begin("truncate", file.truncate(0))
        await importer.wait_told()
        requests.begin("write", file.pwrite(0, b"late"))
        await sent(file._channel)
        await kvmd_sees(shared_system, 1, file.close)
        await kvmd_sees(shared_system, 1, rig.process.close)
        ack_from_now_on(importer)
        importer.close()


async def test_fork_waits_for_a_move_and_sees_it_whole(host: Host) -> None:
    async with vm_only(host) as rig, asked() as requests:
        importer = await deaf_importer(rig)
        await rig.process.write(rig.hva, b"moved")
        await rig.vcpu.run([("r", 0, 8)])
        to = rig.hva + (1 << 41)
        requests.begin("mremap", rig.process.mremap(rig.hva, PAGE_SIZE, PAGE_SIZE, to))
        await importer.wait_told()
        requests.begin("fork", rig.process.fork())
        requests.begin("write", rig.process.write(to, b"after"))
        assert requests.ended == {}
        ack_from_now_on(importer)
        _, child, written = await requests.end("mremap", "fork", "write")
        assert written is None
        assert await child.read(to, 5) in (b"moved", b"after")
        assert await rig.process.read(to, 5) == b"after"
        with pytest.raises(UapiError):
            await child.read(rig.hva, 1)
        assert await host.kvmd.violations() == []
        child.close()
        importer.close()


async def test_a_page_taken_away_at_each_exit_is_no_bug_of_ours(host: Host) -> None:
    """A full ring ends KVM_RUN after the fault and before the access; user space may do that for ever."""
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    await vm.enable_cap(DIRTY_LOG_RING, RING_BYTES)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(46)
    pages = 1024
    hva = await process.mmap(pages * PAGE_SIZE)
    await vm.set_user_memory_region(0, 0, pages * PAGE_SIZE, hva, flags=1)
    reply = await vcpu.ask("MMAP_DIRTY_RING")
    with mmap.mmap(ring := reply.fds.take(0), RING_BYTES) as entries:
        os.close(ring)
        assert (await vcpu.run([("wloop", 0, RING_ROOM - 1, PAGE_SIZE, 1)])).done
        ran = await vcpu.run([("w", (pages - 1) * PAGE_SIZE, b"at last")])
        for n in range(80):
            assert ran.exit_reason == RING_FULL
            entries[n * 16] = F_RESET
            assert await vm.reset_dirty_rings() == 1
            await process.madvise_dontneed(hva + (pages - 1) * PAGE_SIZE, PAGE_SIZE)
            ran = await vcpu.resume()
    for file in (vcpu, vm, process):
        file.close()


async def test_a_long_pre_fault_lets_others_ask_and_ends_with_its_vcpu(
    host: Host, shared_system: System
) -> None:
    async with vm_only(host) as rig, asked() as requests:
        requests.begin("pre-fault", rig.vcpu.pre_fault_memory(0, GIB))
        await sent(rig.vcpu._channel)
        mapped = (await eventually(host.kvmd.stats, lambda s: s["frames"] > 0, "pages come"))["vms"][0]
        assert 0 < mapped["pages_4k"] < GIB // PAGE_SIZE
        assert "pre-fault" not in requests.ended
        with pytest.raises(UapiError) as caught:
            await rig.vcpu.run([])
        assert caught.value.errno == errno.EBUSY, "one request of a vCPU at a time"
        await kvmd_sees(shared_system, 2, rig.close_vm)
        stats = await eventually(host.kvmd.stats, lambda s: s["vms"] == [], "it stops where it is")
        assert stats["frames"] < GIB // PAGE_SIZE


# -- importers ---------------------------------------------------------------------------------------------


async def test_a_channel_that_registers_again_while_it_unregisters_takes_nobodys_name(host: Host) -> None:
    async with vm_only(host) as rig, asked() as requests:
        importer = await deaf_importer(rig)
        lease = importer.lease
        requests.begin("unregister", importer.channel.ask("TDP_UNREGISTER_IMPORTER"))
        await sent(importer.channel)
        await importer.register("second")
        os.close(lease)
        await requests.end("unregister")
        assert rig.tdp_fd is not None
        other = await WireImporter.of(host, rig.tdp_fd)
        await other.register("test")
        other.close()
        importer.close()


# -- iommufd -----------------------------------------------------------------------------------------------


async def test_an_iommufd_closes_while_its_objects_are_being_made_and_used() -> None:
    """The unit answers nothing meanwhile: an HWPT on an IOAS is half made, an attach waits behind the end."""
    with system({"device_sim": ["--devices", "2"]}) as running:
        async with connect_host(running.directory) as host, asked() as requests:
            rigs = [await bare_vm(host) for _ in range(2)]
            half_made = await _close_under(running, requests, rigs[0], 0, _alloc_on_an_ioas)
            attached = await _close_under(running, requests, rigs[1], 1, _attach)
            assert half_made == ["gone"]
            assert attached == [None, "EINVAL"]
            for rig in rigs:
                rig.close()
            await nothing_left(host)


Step = Callable[[System, Requests, Vmm], Awaitable[list[str]]]


async def _close_under(running: System, requests: Requests, rig: Vmm, number: int, step: Step) -> list[Any]:
    await bind_device(rig, number)
    iommu, device = rig.bound
    names = await step(running, requests, rig)
    await sent(iommu._channel, device._channel)
    await kvmd_sees(running, 1, iommu.close, "iommufdd")
    if step is _attach:
        requests.begin("again", device.attach(rig.hwpt_id))
        names.append("again")
        await sent(device._channel)
        for _ in range(3):  # time for iommufdd to see it
            await rig.host.iommufdd.stats()
    running.signal("device_sim", signal.SIGCONT)
    return await requests.end(*names)


async def _alloc_on_an_ioas(running: System, requests: Requests, rig: Vmm) -> list[str]:
    iommu, _ = rig.bound
    pt_id = (await iommu.ask("IOMMU_IOAS_ALLOC")).body["out_ioas_id"]
    running.signal("device_sim", signal.SIGSTOP)
    body = {"dev_id": rig.device_id, "pt_id": pt_id, "data_type": 0, "data_len": 0, "data_uptr": None}
    requests.begin("alloc", iommu.ask("IOMMU_HWPT_ALLOC", **body))
    return ["alloc"]


async def _attach(running: System, requests: Requests, rig: Vmm) -> list[str]:
    iommu, device = rig.bound
    rig.tdp_fd = await rig.vm.create_tdp_fd()
    rig.hwpt_id = await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
    running.signal("device_sim", signal.SIGSTOP)
    requests.begin("attach", device.attach(rig.hwpt_id))
    return ["attach"]
