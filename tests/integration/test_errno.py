"""What each refusal is called: KVM_CREATE_TDP_FD, IOMMU_HWPT_ALLOC, VFIO devices, row by row."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.file import File
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import System, eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import Vmm, attach_device, bind_device, rigged, vm_only, vm_stats

GARBAGE = 0xDEAD


# -- KVM_CREATE_TDP_FD ---------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-02", "RFC-03", "RFC-04", "RFC-05")
@pytest.mark.parametrize(
    "arguments",
    [
        {"as_id": 1},
        {"as_id": 2},
        {"as_id": 1 << 31},
        {"as_id": (1 << 32) - 1},
        {"mode": 1},
        {"pad": 1},
        {"mode": 1 << 31, "pad": 1 << 31},
    ],
    ids=str,
)
async def test_create_with_a_bad_field_is_einval(host: Host, arguments: dict[str, int]) -> None:
    async with vm_only(host) as rig:
        with refused(errno.EINVAL):
            await rig.vm.create_tdp_fd(**arguments)
        rig.tdp_fd = await rig.vm.create_tdp_fd()


@pytest.mark.rfc("RFC-01")
async def test_the_fd_is_closed_on_exec(host: Host) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        assert not os.get_inheritable(rig.tdp_fd)


@pytest.mark.rfc("RFC-06")
async def test_a_bad_field_is_found_before_eexist_and_eexist_before_a_bad_address_space(host: Host) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        with refused(errno.EEXIST):
            await rig.vm.create_tdp_fd()
        with refused(errno.EINVAL):
            await rig.vm.create_tdp_fd(pad=1)
        with refused(errno.EINVAL):
            await rig.vm.create_tdp_fd(as_id=1)


@pytest.mark.rfc("RFC-09", "RFC-10")
async def test_create_needs_a_vcpu_and_its_cpuid(host: Host) -> None:
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    with refused(errno.EINVAL):
        await vm.create_tdp_fd()
    vcpu = await vm.create_vcpu(0)
    with refused(errno.EINVAL):
        await vm.create_tdp_fd()
    with refused(errno.EINVAL):
        await vcpu.set_cpuid(31)
    await vcpu.set_cpuid(32)
    os.close(await vm.create_tdp_fd())
    for file in (vcpu, vm, process):
        file.close()


@contextmanager
def own_fd_limit(room: int) -> Iterator[None]:
    """Let this process open `room` fds more, and no others."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
    free = [fd for fd in range(max(used) + room + 2) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@pytest.mark.rfc("RFC-17", "RFC-20")
async def test_create_into_the_callers_full_fd_table_is_emfile_and_leaks_nothing(host: Host) -> None:
    async with vm_only(host) as rig:
        with own_fd_limit(0), refused(errno.EMFILE):
            await rig.vm.create_tdp_fd()
        await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
        rig.tdp_fd = await rig.vm.create_tdp_fd()


@pytest.mark.rfc("RFC-17", "RFC-20")
@pytest.mark.defect("B-03", "B-04")
@pytest.mark.parametrize("room", [0, 1])
async def test_create_with_kvmds_fd_table_full_is_emfile_and_leaks_nothing(
    host: Host, shared_system: System, room: int
) -> None:
    async with vm_only(host) as rig:
        before = shared_system.all_fds()
        with shared_system.fd_limit("kvmd", room), refused(errno.EMFILE):
            await rig.vm.create_tdp_fd()
        assert (await vm_stats(host))["exported_tdps"] == 0
        shared_system.wait_closed(before)
        rig.tdp_fd = await rig.vm.create_tdp_fd()


async def test_every_object_of_kvmd_comes_back_from_a_full_fd_table(
    host: Host, shared_system: System
) -> None:
    async with vm_only(host) as rig:
        before = await host.kvmd.stats()
        dev_kvm = File(
            host.loop, (await host.kvmd._channel.ask("OPEN", {"path": "/dev/kvm"})).fds.take(0), "kvm"
        )
        with shared_system.fd_limit("kvmd", 1):
            with refused(errno.EMFILE):
                await host.kvmd.start_process()
            with refused(errno.EMFILE):
                await rig.vm.create_vcpu(1)
        for room in (0, 1, 2):  # the fd sent along finds no room, or the VM's own two do not
            with shared_system.fd_limit("kvmd", room), refused(errno.EMFILE):
                await dev_kvm.ask("KVM_CREATE_VM", [rig.process.dup()])
        assert await host.kvmd.stats() == before
        (await rig.vm.create_vcpu(1)).close()
        dev_kvm.close()


async def test_registering_with_kvmds_fd_table_full_is_emfile_and_leaks_nothing(
    host: Host, shared_system: System
) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        await bind_device(rig)
        iommu, _ = rig.bound
        stats, before = await vm_stats(host), shared_system.all_fds()
        # The front door's connection, the fd sent along, the channel, the lease, three windows.
        for room in range(1, 6):
            with shared_system.fd_limit("kvmd", room), refused(errno.EMFILE):
                await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
            await eventually(lambda: vm_stats(host), lambda s: s["importers"] == 0, "unregistered")
            shared_system.wait_closed(before)
        await iommu.destroy(await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd))
        assert await vm_stats(host) == stats


async def test_opening_a_device_with_a_full_fd_table_leaves_it_openable(
    host: Host, shared_system: System
) -> None:
    with shared_system.fd_limit("iommufdd", 1), refused(errno.EMFILE):
        await host.iommufdd.open_device(0)
    (await host.iommufdd.open_device(0)).close()


@pytest.mark.rfc("RFC-19")
@pytest.mark.parametrize("op", ["KVM_CREATE_TDP_FD", "KVM_RUN", "", "x" * 90])
async def test_any_ioctl_on_a_tdp_fd_is_enodev(host: Host, op: str) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        file = File(host.loop, os.dup(rig.tdp_fd), "tdp")
        with refused(errno.ENODEV):
            await file.ask(op)
        file.close()


async def test_an_unknown_request_is_enotty_everywhere_else(host: Host) -> None:
    async with rigged(host) as rig:
        iommu, device = rig.bound
        assert rig.portal is not None
        doors = (host.kvmd, host.iommufdd, host.device_sim, rig.portal)
        for asked in (rig.vm, rig.vcpu, rig.process, iommu, device):
            with refused(errno.ENOTTY):
                await asked.ask("KVM_NO_SUCH_THING")
        for door in doors:
            with refused(errno.ENOTTY):
                await door._channel.ask("NO_SUCH_THING")


# -- IOMMU_HWPT_ALLOC ----------------------------------------------------------------------------------


async def alloc(rig: Vmm, fd: int | None = None, **changed: Any) -> int:
    """IOMMU_HWPT_ALLOC as a correct caller sends it, but for what is `changed`."""
    number = rig.tdp_fd if fd is None else fd
    assert number is not None
    iommu, _ = rig.bound
    body: dict[str, Any] = {
        "dev_id": rig.device_id,
        "data_uptr": number.to_bytes(8, "little"),
        "fd_table": [number],
        **changed,
    }
    hwpt_id: int = (await iommu.ask("IOMMU_HWPT_ALLOC", [os.dup(number)], **body)).body["out_hwpt_id"]
    return hwpt_id


ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("struct too small", errno.EINVAL, {"size": 20}),
    ("reserved field", errno.EOPNOTSUPP, {"reserved": 1}),
    ("no data type but data", errno.EINVAL, {"data_type": 0}),
    ("another data type on no IOAS", errno.EINVAL, {"data_type": 1}),
    ("unknown dev_id", errno.ENOENT, {"dev_id": GARBAGE}),
    ("data_len 0", errno.EINVAL, {"data_len": 0}),
    ("data_len 4", errno.EINVAL, {"data_len": 4}),
    ("data_len 12", errno.EINVAL, {"data_len": 12}),
    ("data_len 16", errno.EINVAL, {"data_len": 16}),
    ("null data_uptr", errno.EINVAL, {"data_uptr": None}),
    ("unreadable data_uptr", errno.EFAULT, {"data_uptr": b"\x05\x00\x00"}),
    ("fd above INT_MAX", errno.EINVAL, {"data_uptr": (1 << 31).to_bytes(8, "little")}),
    ("fd with all bits set", errno.EINVAL, {"data_uptr": b"\xff" * 8}),
    ("fd that is not open", errno.EBADF, {"fd_table": []}),
    ("NEST_PARENT", errno.EOPNOTSUPP, {"flags": 1}),
    ("DIRTY_TRACKING", errno.EOPNOTSUPP, {"flags": 2}),
    ("unknown flag", errno.EOPNOTSUPP, {"flags": 1 << 31}),
]


@pytest.mark.rfc(
    "RFC-32", "RFC-33", "RFC-34", "RFC-35", "RFC-36", "RFC-38", "RFC-40", "RFC-43", "RFC-44", "RFC-53"
)
@pytest.mark.defect("B-07", "B-16")
@pytest.mark.parametrize(("number", "changed"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
async def test_a_refused_alloc_leaves_the_tdp_fds_references_as_they_were(
    host: Host, shared_system: System, number: int, changed: dict[str, Any]
) -> None:
    """B-07: a closed fd and one above INT_MAX went on as good ones; B-08: the TDP FD was put twice."""
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        await bind_device(rig)
        before = shared_system.all_fds()
        for _ in range(2):
            with refused(number):
                await alloc(rig, **changed)
        shared_system.wait_closed(before)
        hwpt = await alloc(rig)
        await rig.bound[0].destroy(hwpt)
        rig.close_tdp_fd()
        await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "nobody else holds it")
        rig.tdp_fd = await rig.vm.create_tdp_fd()


@pytest.mark.rfc("RFC-31", "RFC-37")
async def test_pt_id_is_ignored(host: Host) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        await bind_device(rig)
        assert await alloc(rig, pt_id=GARBAGE) != rig.device_id


@pytest.mark.rfc("RFC-39")
@pytest.mark.defect("B-07")
async def test_an_fd_of_another_kind_is_einval(host: Host) -> None:
    """A VM, a vCPU, a process, an iommufd, a pipe, an eventfd; B-07: it was taken for a TDP FD."""
    async with vm_only(host) as rig:
        await bind_device(rig)
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        iommu, _ = rig.bound
        others = [rig.vm.dup(), rig.vcpu.dup(), rig.process.dup(), iommu.dup(), os.eventfd(0), *os.pipe()]
        for other in others:
            with refused(errno.EINVAL):
                await alloc(rig, other)
            os.close(other)


@pytest.mark.rfc("RFC-54")
@pytest.mark.defect("B-09")
async def test_a_second_hwpt_is_ebusy_and_the_first_is_still_told_of_flushes(host: Host) -> None:
    """B-09: its abort unregistered the first; B-08: and put its TDP FD."""
    async with rigged(host) as rig:
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        with refused(errno.EBUSY):
            await alloc(rig)
        (before,) = (await host.iommufdd.stats())["hwpts"]
        assert await rig.process.move_pages(rig.hva + page, PAGE_SIZE) == 1
        (after,) = (await host.iommufdd.stats())["hwpts"]
        assert after["invalidations"] == before["invalidations"] + 1
        assert await rig.fill(page, 1) is Status.SUCCESS
        assert (await vm_stats(host))["importers"] == 1


SIXES = {"kvmd": ["--ept-levels", "5", "--maxphyaddr", "52"]}
UNITS = [
    ("no snoop control", ["--no-snoop-control"], 46),
    ("leaves of 2M at most", ["--max-page", "2M"], 46),
    ("leaves of 4K at most", ["--max-page", "4K"], 46),
    ("four levels", ["--levels", "4"], 52),
]


@pytest.mark.rfc("RFC-48", "RFC-49", "RFC-50")
@pytest.mark.parametrize(("options", "maxphyaddr"), [u[1:] for u in UNITS], ids=[u[0] for u in UNITS])
async def test_a_table_the_unit_cannot_walk_is_eopnotsupp(options: list[str], maxphyaddr: int) -> None:
    with system({**SIXES, "device_sim": options}) as weak:
        async with connect_host(weak.directory) as host, vm_only(host, maxphyaddr=maxphyaddr) as rig:
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await bind_device(rig)
            before = weak.all_fds()
            with refused(errno.EOPNOTSUPP):
                await alloc(rig)
            assert (await vm_stats(host))["importers"] == 0
            weak.wait_closed(before)
            rig.close_tdp_fd()
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")


# -- VFIO devices --------------------------------------------------------------------------------------


async def test_paths_that_are_not_there_are_enoent_and_a_device_opens_once(host: Host) -> None:
    for path in ("/dev/vfio/devices/vfio4", "/dev/vfio/devices/vfio", "/dev/vfio/devices/vfio-1", "/dev/kvm"):
        with refused(errno.ENOENT):
            await host.iommufdd._channel.ask("OPEN", {"path": path})
    for path in ("/dev/iommu", "/dev/null", ""):
        with refused(errno.ENOENT):
            await host.kvmd._channel.ask("OPEN", {"path": path})
    device = await host.iommufdd.open_device(3)
    with refused(errno.EBUSY):
        await host.iommufdd.open_device(3)
    device.close()
    async with vm_only(host) as rig:
        await bind_device(rig, 3)


async def test_bind_is_refused_without_iommufd_with_another_fd_with_flags_and_twice(host: Host) -> None:
    async with vm_only(host) as rig:
        device = await host.iommufdd.open_device(0)
        iommu = await host.iommufdd.open_iommu(rig.process)
        rig.extra += [device, iommu]
        with refused(errno.EBADF):
            await device.ask("VFIO_DEVICE_BIND_IOMMUFD")
        for other in (rig.vm.dup(), device.dup(), os.eventfd(0)):
            with refused(errno.EBADFD):
                await device.ask("VFIO_DEVICE_BIND_IOMMUFD", [other])
        with refused(errno.EINVAL):
            await device.ask("VFIO_DEVICE_BIND_IOMMUFD", [iommu.dup()], flags=1)
        await device.bind(iommu)
        with refused(errno.EINVAL):
            await device.bind(iommu)


async def test_a_device_that_is_not_bound_does_nothing(host: Host) -> None:
    device = await host.iommufdd.open_device(0)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", {"pt_id": 1}),
        ("VFIO_DEVICE_DETACH_IOMMUFD_PT", {}),
        ("VFIO_DEVICE_MMAP", {"region": 2}),
    ]
    for op, body in requests:
        with refused(errno.EINVAL):
            await device.ask(op, **body)
    device.close()


async def test_attach_errors(host: Host) -> None:
    """Ids that are no HWPT, flags, a struct too short; attached to the same already is no error."""
    async with rigged(host) as rig:
        _, device = rig.bound
        await device.attach(rig.hwpt_id)
        with refused(errno.EINVAL):
            await device.ask("VFIO_DEVICE_ATTACH_IOMMUFD_PT", pt_id=rig.hwpt_id, flags=1)
        with refused(errno.EINVAL):
            await device.ask("VFIO_DEVICE_DETACH_IOMMUFD_PT", flags=1)
        await device.detach()
        for pt_id in (0, GARBAGE):
            with refused(errno.ENOENT):
                await device.attach(pt_id)
        with refused(errno.EINVAL):
            await device.attach(rig.device_id)
        with refused(errno.EINVAL):
            await device.ask("VFIO_DEVICE_ATTACH_IOMMUFD_PT", argsz=11, pt_id=rig.hwpt_id)
        with refused(errno.EINVAL):
            await device.ask("VFIO_DEVICE_DETACH_IOMMUFD_PT", argsz=7)
        await device.detach()  # of nothing is no error
        await device.attach(rig.hwpt_id)
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS


async def test_a_portal_is_mapped_once(host: Host) -> None:
    async with rigged(host) as rig:
        _, device = rig.bound
        with refused(errno.EBUSY):
            await device.map_portal()


@pytest.mark.rfc("RFC-66")
async def test_destroy_is_ebusy_while_a_device_is_attached_and_enoent_of_what_is_no_hwpt(host: Host) -> None:
    async with rigged(host) as rig:
        iommu, device = rig.bound
        with refused(errno.EBUSY):
            await iommu.destroy(rig.hwpt_id)
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS
        await device.detach()
        await iommu.destroy(rig.hwpt_id)
        for gone in (rig.hwpt_id, GARBAGE):
            with refused(errno.ENOENT):
                await iommu.destroy(gone)
        with refused(errno.ENOENT):
            await device.attach(rig.hwpt_id)


async def test_an_hwpt_of_another_iommufd_is_enoent(host: Host) -> None:
    async with rigged(host) as rig:
        other = await host.iommufdd.open_iommu(rig.process)
        second = await host.iommufdd.open_device(1)
        rig.extra += [other, second]
        device_id = await second.bind(other)
        with refused(errno.ENOENT):
            await second.attach(rig.hwpt_id)
        with refused(errno.ENOENT):
            await rig.bound[0].hwpt_alloc_kvm(device_id + 100, rig.tdp_fd or 0)


async def test_an_hwpt_allocated_while_its_iommufd_closes_is_gone_with_it(host: Host) -> None:
    async with vm_only(host) as rig:
        for _ in range(20):
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await bind_device(rig)
            iommu, device = rig.bound
            number = rig.tdp_fd
            iommu._channel.call(
                "IOMMU_HWPT_ALLOC",
                {
                    "dev_id": rig.device_id,
                    "data_uptr": number.to_bytes(8, "little"),
                    "fd_table": [number],
                },
                [os.dup(number)],
            )
            iommu._channel.flush()
            iommu.close()
            rig.close_tdp_fd()
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
            device.close()
            await eventually(host.iommufdd.stats, lambda s: s["devices_bound"] == 0, "unbound")


async def test_the_whole_bring_up_works_after_every_refusal(host: Host) -> None:
    async with vm_only(host) as rig:
        await attach_device(rig)
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS
