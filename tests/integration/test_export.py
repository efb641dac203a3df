"""Exporting a TDP from a real kvmd: what it is built as, who comes second, what memory the caller has."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import pytest
import trio

from protocol.errors import UapiError
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import TRUSTING, eventually, system, until
from tests.kit.refusals import refused
from tests.kit.vmm import QUEUE_START, vm_only, vm_stats
from tests.kit.wire_importer import WireImporter


@pytest.mark.rfc("RFC-12", "RFC-13", "RFC-14")
async def test_a_kvmd_that_cannot_export_answers_so_and_runs_vms_all_the_same() -> None:
    options = ["--cannot-export", "amd", "--cannot-export", "hyperv"]
    with system({"kvmd": options}) as running:
        async with connect_host(running.directory) as host, vm_only(host) as rig:
            with refused(errno.EOPNOTSUPP):
                await rig.vm.create_tdp_fd()
            with refused(errno.EINVAL):
                await rig.vm.create_tdp_fd(mode=1)
            page = rig.memory.allocate(1)
            await rig.memory.write(page, b"a VM without devices")
            assert await rig.memory.read(page, 20) == b"a VM without devices"


@pytest.mark.rfc("RFC-11")
@pytest.mark.defect("B-27")
async def test_a_vm_exports_or_has_non_coherent_dma(host: Host) -> None:
    async with vm_only(host) as rig:
        await rig.vm.ask("KVM_REGISTER_NONCOHERENT_DMA")
        with refused(errno.EINVAL):
            await rig.vm.create_tdp_fd()
        await rig.vm.ask("KVM_UNREGISTER_NONCOHERENT_DMA")
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        with refused(errno.EBUSY):
            await rig.vm.ask("KVM_REGISTER_NONCOHERENT_DMA")


@pytest.mark.rfc("RFC-16")
@pytest.mark.defect("B-02")
async def test_of_creates_sent_at_once_over_several_copies_one_wins(host: Host) -> None:
    async with vm_only(host) as rig:
        for _ in range(10):
            made: list[int] = []
            refusals: list[int] = []

            async def create(made: list[int] = made, refusals: list[int] = refusals) -> None:
                try:
                    made.append(await rig.vm.create_tdp_fd())
                except UapiError as error:
                    refusals.append(error.errno)

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(create)
            assert (len(made), refusals) == (1, [errno.EEXIST] * 2)
            os.close(made[0])
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")


@pytest.mark.rfc("RFC-18")
@pytest.mark.defect("B-06")
async def test_a_result_that_cannot_be_written_leaves_no_fd_and_a_free_address_space(host: Host) -> None:
    async with vm_only(host) as rig:
        struct: dict[str, Any] = {"as_id": 0, "mode": 0, "pad": 0}
        read_only = await rig.process.mmap(PAGE_SIZE, prot="r")
        for argp in (read_only, 8):
            with refused(errno.EFAULT):
                await rig.vm.ask("KVM_CREATE_TDP_FD", **struct, argp=argp)
            assert (await vm_stats(host))["exported_tdps"] == 0
        reply = await rig.vm.ask("KVM_CREATE_TDP_FD", **struct, argp=rig.hva)
        rig.tdp_fd = reply.fds.take(0)


@pytest.mark.rfc("RFC-19")
@pytest.mark.parametrize("prot", [mmap.PROT_READ, mmap.PROT_WRITE])
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
async def test_a_tdp_fd_cannot_be_mapped(host: Host, prot: int, flags: int) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        with pytest.raises(OSError, match="No such device") as caught:
            mmap.mmap(rig.tdp_fd, PAGE_SIZE, flags, prot)
        assert caught.value.errno == errno.ENODEV


@pytest.mark.rfc("RFC-21", "RFC-22", "RFC-25", "RFC-26")
@pytest.mark.parametrize("vcpu_first", [True, False])
async def test_the_root_in_the_metadata_is_the_vcpus(host: Host, vcpu_first: bool) -> None:
    """Who comes first does not matter: no page is faulted in twice, and there is one root."""
    async with vm_only(host) as rig:
        pages = rig.memory.allocate(2)
        if vcpu_first:
            await rig.memory.touch([pages])
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        importer = await WireImporter.of(host, rig.tdp_fd)
        raw = await importer.metadata()
        importer.close()
        assert len(raw) == 104
        meta = ExportedTdpMeta.from_bytes(raw)
        assert (meta.type, meta.level, meta.max_huge_page_level) == (1, 4, 3)
        assert all(mask >> 11 & 1 for masks in meta.rsvd_bits_mask for mask in masks)
        await rig.memory.touch([pages, pages + PAGE_SIZE])
        stats = await vm_stats(host)
        assert (stats["ept_violations"], stats["pages_4k"], stats["table_pages"]) == (2, 2, 4)


@pytest.mark.rfc("RFC-24")
@pytest.mark.defect("B-28")
async def test_a_later_vcpu_that_would_not_share_is_refused() -> None:
    with system({"kvmd": ["--ept-levels", "5", "--maxphyaddr", "52"]}) as running:
        async with connect_host(running.directory) as host, vm_only(host) as rig:
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            later = await rig.vm.create_vcpu(1)
            rig.extra.append(later)
            with refused(errno.EINVAL):
                await later.set_cpuid(52)
            await later.set_cpuid(46)
            assert (await vm_stats(host))["vcpus_apart"] == 0


@pytest.mark.rfc("RFC-95")
@pytest.mark.defect("B-33")
@pytest.mark.parametrize("batch", [None, 4096])
async def test_others_are_answered_while_a_large_slot_is_deleted(batch: int | None) -> None:
    """Whoever asks meanwhile sees the root half cleared: here an importer holds each batch's flush until
    somebody has asked.  Unless said, a batch is what little time is enough for, and so all of this slot.
    That others get a turn where nobody has to ack: tests/unit/kvmd/test_long_work.py.
    """
    size = 96 * MIB
    first, pages = QUEUE_START, size // PAGE_SIZE
    said = [] if batch is None else ["--zap-batch", str(batch)]
    with system({"kvmd": [*TRUSTING["kvmd"], *said]}) as running:
        async with connect_host(running.directory) as host, vm_only(host, ram=GIB) as rig:
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await rig.memory.touch([first + n * PAGE_SIZE for n in range(pages)])
            until(lambda: "compiled code has come" in running.log("kvmd"), "compiled code")
            assert (await vm_stats(host))["pages_4k"] == pages
            importer = await WireImporter.of(host, rig.tdp_fd, ack=False)
            await importer.register()
            left = [pages]

            async def look() -> None:
                while left[-1]:
                    await importer.wait_told()
                    left.append((await vm_stats(host))["pages_4k"])
                    importer.ack_all()
                importer.ack = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                await rig.vm.set_user_memory_region(0, 0, 0, 0)
            assert left == list(range(pages, -1, -(batch or pages)))
            importer.close()


@pytest.mark.defect("B-36")
async def test_an_importer_that_dropped_its_tdp_fd_is_told_there_is_nothing_left(host: Host) -> None:
    async with vm_only(host) as rig:
        tdp_fd = await rig.vm.create_tdp_fd()
        importer = await WireImporter.of(host, tdp_fd)
        os.close(tdp_fd)
        await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
        with refused(errno.ENODEV):
            await importer.metadata()
        with refused(errno.ENODEV):
            await importer.register()
        with refused(errno.ENODEV):
            access = {"read": True, "write": False, "exec": False}
            await importer.channel.ask("TDP_FAULT", {"mm": 1, "gfn": 0, **access})
        importer.close()
