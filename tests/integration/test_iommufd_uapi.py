"""/dev/iommu row by row: sizes, ioctls a KVM HWPT does not take, hardware info, an IOAS and its HWPTs."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from protocol.errors import UapiError
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import system
from tests.kit.refusals import refused
from tests.kit.vmm import Vmm, attach_device, bind_device, rigged, vm_only

GARBAGE = 0xDEAD


# -- sizes ---------------------------------------------------------------------------------------------

COPIED: dict[str, Any] = {"src_iova": 0, "length": 4096}

# op, size of the struct, of its oldest version, and fields with which it does something harmless
STRUCTS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("IOMMU_DESTROY", 8, 8, {"id": GARBAGE}),
    ("IOMMU_IOAS_ALLOC", 12, 12, {"flags": 2}),
    ("IOMMU_IOAS_MAP", 40, 40, {"ioas_id": GARBAGE, "flags": 6, "user_va": 0, "length": 4096}),
    ("IOMMU_IOAS_UNMAP", 24, 24, {"ioas_id": GARBAGE, "iova": 0, "length": 4096}),
    ("IOMMU_IOAS_IOVA_RANGES", 32, 32, {"ioas_id": GARBAGE}),
    ("IOMMU_IOAS_COPY", 40, 40, {"src_ioas_id": GARBAGE, "dst_ioas_id": 1, "flags": 6, **COPIED}),
    ("IOMMU_IOAS_MAP_FILE", 40, 40, {"ioas_id": GARBAGE, "flags": 6, "fd": 0, "start": 0, "length": 4096}),
    ("IOMMU_IOAS_CHANGE_PROCESS", 8, 8, {"reserved": 1}),
    ("IOMMU_IOAS_ALLOW_IOVAS", 24, 24, {"ioas_id": GARBAGE, "num_iovas": 0, "allowed_iovas": None}),
    ("IOMMU_IOAS_FOLLOW_KVM", 12, 12, {"ioas_id": GARBAGE}),
    ("IOMMU_OPTION", 24, 24, {"option_id": 2}),
    ("IOMMU_HWPT_ALLOC", 40, 24, {"dev_id": GARBAGE, "data_uptr": None}),
    ("IOMMU_GET_HW_INFO", 40, 32, {"dev_id": GARBAGE}),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", 16, 16, {"hwpt_id": GARBAGE}),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", 48, 48, {"hwpt_id": GARBAGE}),
    ("IOMMU_HWPT_INVALIDATE", 32, 32, {"hwpt_id": GARBAGE}),
]


@pytest.mark.parametrize(("op", "size", "least", "fields"), STRUCTS, ids=[row[0] for row in STRUCTS])
async def test_every_struct_is_as_long_as_its_oldest_version_and_zero_beyond_the_newest(
    host: Host, op: str, size: int, least: int, fields: dict[str, Any]
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        with pytest.raises(UapiError) as usual:
            await iommu.ask(op, **fields)
        assert usual.value.errno not in (errno.EINVAL, errno.E2BIG, errno.EFAULT)
        for good in (least, size):
            with refused(usual.value.errno):
                await iommu.ask(op, size=good, **fields)
        for short in (0, 4, least - 1):
            with refused(errno.EINVAL, f"at least {least}"):
                await iommu.ask(op, size=short, **fields)
        with refused(usual.value.errno):
            await iommu.ask(op, size=size + 8, tail=bytes(8), **fields)
        for n in range(8):
            tail = bytes(n) + b"\x01" + bytes(7 - n)
            with refused(errno.E2BIG):
                await iommu.ask(op, size=size + 8, tail=tail, **fields)
        with refused(errno.EFAULT):
            await iommu.ask(op, size=size + 8, tail=bytes(7), **fields)


async def test_an_unknown_ioctl_is_enotty(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, device = rig.bound
        for asked, op in ((iommu, "IOMMU_FAULT_QUEUE_ALLOC"), (device, "VFIO_DEVICE_FEATURE")):
            with refused(errno.ENOTTY):
                await asked.ask(op)


# -- what a KVM HWPT does not take ---------------------------------------------------------------------

NOT_FOR_KVM: list[tuple[str, dict[str, Any]]] = [
    ("IOMMU_HWPT_INVALIDATE", {}),
    ("IOMMU_HWPT_INVALIDATE", {"entry_num": 1, "entry_len": 24, "data_uptr": bytes(24)}),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"flags": 1}),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {}),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {}),
]


@pytest.mark.rfc("RFC-56")
@pytest.mark.parametrize(("op", "fields"), NOT_FOR_KVM, ids=str)
async def test_invalidate_and_dirty_tracking_of_a_kvm_hwpt_are_enoent(
    host: Host, op: str, fields: dict[str, Any]
) -> None:
    async with rigged(host) as rig:
        for hwpt_id in (rig.hwpt_id, rig.device_id, GARBAGE):
            with refused(errno.ENOENT):
                await rig.bound[0].ask(op, hwpt_id=hwpt_id, **fields)


BAD_FIELDS: list[tuple[str, dict[str, Any], int]] = [
    ("IOMMU_HWPT_INVALIDATE", {"reserved": 1}, errno.EOPNOTSUPP),
    ("IOMMU_HWPT_INVALIDATE", {"entry_num": 1}, errno.EINVAL),
    ("IOMMU_HWPT_INVALIDATE", {"entry_num": 1, "entry_len": 0, "data_uptr": b"x"}, errno.EINVAL),
    ("IOMMU_HWPT_INVALIDATE", {"entry_num": 1, "entry_len": 4097, "data_uptr": b"x"}, errno.EINVAL),
    ("IOMMU_HWPT_INVALIDATE", {"entry_num": (1 << 19) + 1, "data_uptr": b"x"}, errno.EINVAL),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"flags": 2}, errno.EOPNOTSUPP),
    ("IOMMU_HWPT_SET_DIRTY_TRACKING", {"reserved": 1}, errno.EOPNOTSUPP),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {"flags": 2}, errno.EOPNOTSUPP),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", {"reserved": 1}, errno.EOPNOTSUPP),
]


@pytest.mark.parametrize(("op", "fields", "number"), BAD_FIELDS, ids=str)
async def test_a_bad_field_is_found_before_the_id(
    host: Host, op: str, fields: dict[str, Any], number: int
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        with refused(number):
            await rig.bound[0].ask(op, hwpt_id=GARBAGE, **fields)


# -- hardware info -------------------------------------------------------------------------------------


async def test_hardware_info_is_the_registers_of_the_unit_before_the_device() -> None:
    options = ["--devices", "2", "--units", "2", "--unit", "1:no-snoop-control", "--device", "1:unit=1"]
    with system({"device_sim": options}) as made:
        async with connect_host(made.directory) as host, vm_only(host) as rig:
            await bind_device(rig)
            iommu, _ = rig.bound
            second = await host.iommufdd.open_device(1)
            rig.extra.append(second)
            replies = [
                (await iommu.ask("IOMMU_GET_HW_INFO", dev_id=dev_id)).body
                for dev_id in (rig.device_id, await second.bind(iommu))
            ]
            (flags, cap, ecap), (_, other_cap, other_ecap) = (
                struct.unpack("<QQQ", reply["data"]) for reply in replies
            )
            assert (replies[0]["out_data_type"], replies[0]["data_len"], flags) == (1, 24, 0)
            assert (cap == other_cap, ecap ^ other_ecap) == (True, 1 << 7)


async def test_hardware_info_is_cut_to_the_callers_length_or_zeroes_the_rest_and_says_its_own(
    host: Host,
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        whole = (await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id)).body["data"]
        for length in (0, 8, 23, 24, 25, 64, 4096):
            reply = (await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id, data_len=length)).body
            assert (reply["data_len"], reply["data"]) == (24, (whole + bytes(4096))[:length])
        with refused(errno.EFAULT):
            await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id, data_len=4097)
        with refused(errno.EFAULT):
            await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id, data_uptr=False)
        await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id, data_uptr=False, data_len=0)
        for changed in ({"flags": 1}, {"reserved": 1}):
            with refused(errno.EOPNOTSUPP):
                await iommu.ask("IOMMU_GET_HW_INFO", dev_id=rig.device_id, **changed)  # type: ignore[arg-type]
        for dev_id in (GARBAGE, 0):
            with refused(errno.ENOENT):
                await iommu.ask("IOMMU_GET_HW_INFO", dev_id=dev_id)


# -- an IOAS and HWPTs on it ---------------------------------------------------------------------------


async def ioas_of(rig: Vmm) -> int:
    ioas: int = (await rig.bound[0].ask("IOMMU_IOAS_ALLOC")).body["out_ioas_id"]
    return ioas


async def paging(rig: Vmm, pt_id: int, **changed: Any) -> int:
    body = {"dev_id": rig.device_id, "data_type": 0, "data_len": 0, "data_uptr": None, **changed}
    hwpt: int = (await rig.bound[0].ask("IOMMU_HWPT_ALLOC", pt_id=pt_id, **body)).body["out_hwpt_id"]
    return hwpt


@pytest.mark.rfc("RFC-55", "RFC-43")
async def test_nesting_is_refused_with_the_series_reason(host: Host) -> None:
    reason = "faults of a nested domain are not handled"
    async with rigged(host) as rig:
        iommu, _ = rig.bound
        with refused(errno.EINVAL, reason):
            await paging(rig, rig.hwpt_id)
        with refused(errno.EINVAL, reason):
            await paging(rig, rig.hwpt_id, data_type=1, data_len=8, data_uptr=bytes(8))
        assert rig.tdp_fd is not None
        with refused(errno.EOPNOTSUPP, reason):
            await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd, flags=1)


async def test_an_hwpt_on_an_ioas_is_refused_row_by_row(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, device = rig.bound
        ioas = await ioas_of(rig)
        hwpt = await paging(rig, ioas)
        for pt_id in (GARBAGE, rig.device_id, hwpt):
            with refused(errno.EINVAL):
                await paging(rig, pt_id)
        for changed in ({"flags": 1}, {"flags": 2}, {"flags": 4}):
            with refused(errno.EOPNOTSUPP):
                await paging(rig, ioas, **changed)
        with refused(errno.EOPNOTSUPP):
            await paging(rig, ioas, data_type=1, data_len=8, data_uptr=bytes(8))
        with refused(errno.ENOENT):
            await paging(rig, ioas, dev_id=ioas)
        with refused(errno.EOPNOTSUPP):
            await device.attach(ioas)
        for op in ("IOMMU_HWPT_SET_DIRTY_TRACKING", "IOMMU_HWPT_GET_DIRTY_BITMAP"):
            with refused(errno.EOPNOTSUPP, "dirty"):
                await iommu.ask(op, hwpt_id=hwpt)


async def test_an_ioas_goes_after_its_hwpts_and_a_device_never(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, device = rig.bound
        ioas = await ioas_of(rig)
        hwpt = await paging(rig, ioas)
        await device.attach(hwpt)
        for busy in (ioas, hwpt, rig.device_id):
            with refused(errno.EBUSY):
                await iommu.destroy(busy)
        await device.detach()
        for gone in (hwpt, ioas):
            await iommu.destroy(gone)
            with refused(errno.ENOENT):
                await iommu.destroy(gone)


@pytest.mark.rfc("RFC-41")
async def test_built_without_kvm_hwpts_an_alloc_is_eopnotsupp_and_an_ioas_still_works() -> None:
    with system({"iommufdd": ["--no-kvm-hwpt"]}) as without:
        async with connect_host(without.directory) as host, vm_only(host) as rig:
            with refused(errno.EOPNOTSUPP, "IOMMUFD_KVM_HWPT"):
                await attach_device(rig)
            await rig.bound[1].attach(await paging(rig, await ioas_of(rig)))
            with refused(errno.EINVAL):
                await paging(rig, 0, data_type=3, data_len=4, data_uptr=bytes(4))
            with refused(errno.EFAULT):
                await paging(rig, 0, data_type=3, data_len=8, data_uptr=bytes(4))
