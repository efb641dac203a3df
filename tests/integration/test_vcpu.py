"""A vCPU of a running kvmd: exits and resumes, a guest that polls, and a device beside emulated MMIO."""

from __future__ import annotations

import errno
import signal

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.kvm_run import ExitReason
from protocol.rpc.channel import PeerGone
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.vcpu import RunResult
from tests.kit.daemons import system, until
from tests.kit.vmm import bare_vm, rigged, vm_only, vm_stats

HOLE = 0x20_0000_0000  # above all RAM


async def test_a_program_goes_through_its_exits_to_its_end(host: Host) -> None:
    async with vm_only(host) as rig:
        ran = await rig.vcpu.run([["add", HOLE, 4, 3], ["xchg", 0x1000, b"abcd"], ["r", 0x1000, 4]])
        assert ran.mmio is not None
        assert (ran.mmio.phys_addr, ran.mmio.len, ran.mmio.is_write) == (HOLE, 4, False)
        ran = await rig.vcpu.resume(b"\x10")
        assert ran.mmio is not None
        assert (ran.mmio.is_write, ran.mmio.data) == (True, b"\x13\0\0\0")
        ran = await rig.vcpu.resume()
        assert (ran.done, ran.exit_reason, ran.finished) == (True, ExitReason.IO, 3)
        assert ran.reads == [b"abcd"]
        await rig.process.munmap(rig.hva, 4096)
        assert (await rig.vcpu.run([["r", 0, 1]])).errno == errno.EFAULT
        emulated = await rig.vcpu.run([["r", 0, 1]], cpl=0)
        assert (emulated.errno, emulated.exit_reason) == (0, ExitReason.MMIO)
        assert (await vm_stats(host))["pf_mmio_spte_created"] == 1
        assert await host.kvmd.violations() == []


async def test_a_guest_that_polls_holds_nobody_up(host: Host) -> None:
    ended: list[RunResult] = []
    async with vm_only(host) as rig, trio.open_nursery() as nursery:

        async def poll() -> None:
            ended.append(await rig.vcpu.run([["spin_until_ne", 0x3000, 0]]))

        nursery.start_soon(poll)
        for i in range(50):
            await rig.process.write(rig.hva + 0x5000, bytes([i]))
        assert ended == []
        await rig.process.madvise_dontneed(rig.hva + 0x3000, 4096)
        await rig.process.write(rig.hva + 0x3000, b"go")
    assert ended[0].done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_polling_guest_does_not_keep_kvmd_from_stopping(number: signal.Signals) -> None:
    with system() as running:
        async with connect_host(running.directory) as host:
            rig = await bare_vm(host)

            async def poll() -> None:
                with pytest.raises(PeerGone):
                    await rig.vcpu.run([["spin_until_ne", 0x3000, 0]])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(poll)
                await rig.process.write(rig.hva, b"x")  # by now it runs
                running.signal("kvmd", number)
            rig.close()
        until(lambda: running.exited("kvmd"), "kvmd has ended")


@pytest.mark.rfc("RFC-104", "RFC-71")
@pytest.mark.defect("B-22")
async def test_a_device_s_write_where_the_guest_has_emulated_mmio_reaches_nobody(host: Host) -> None:
    async with rigged(host) as rig:
        assert (await rig.vcpu.run([["w", HOLE, b"x"]])).exit_reason == ExitReason.MMIO
        assert await rig.fill(HOLE) is not Status.SUCCESS
        assert (await vm_stats(host))["pf_mmio_spte_created"] == 1
        assert await rig.fill(0x5000) is Status.SUCCESS, "the device works on"
        assert await host.kvmd.violations() == []


@pytest.mark.rfc("RFC-73")
@pytest.mark.defect("B-24")
async def test_a_device_s_write_to_a_tracked_page_fails_and_a_cpu_s_is_emulated(host: Host) -> None:
    async with rigged(host) as rig:
        await rig.vm.page_track_add(0x5000)
        assert await rig.fill(0x5000) is not Status.SUCCESS
        assert (await rig.vcpu.run([["w", 0x5000, b"cpu"]])).done
        assert await rig.seen_by_process(0x5000, 3) == b"cpu"
        assert await host.kvmd.violations() == []
        await rig.vm.page_track_remove(0x5000)
        assert await rig.fill(0x5000) is Status.SUCCESS
