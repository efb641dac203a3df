"""A VMM that asks anything of anybody: each request on each fd, with the wrong fds, twice, from elsewhere.

What is not in a table is as the rule says; the tables hold what the kernel answers where it differs.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvmd.service.tdp_fd import TDP_FD
from kvmd.service.vcpu import VCPU
from kvmd.service.vm import VM
from protocol.rpc.service import Service
from protocol.uapi.message import Ioctl
from qemu_shim.vmm.machine import Host
from tests.integration.attacks import close_all
from tests.integration.zoo import OPS, REQUESTS, SERVICES, Zoo, zoo_of
from tests.kit.daemons import eventually

# -- tables ------------------------------------------------------------------------------------------------

# What the request of the zoo gets the first time and the second, where that is not "granted" twice.
TWICE = {
    "UFFDIO_COPY": (0, errno.EEXIST),
    "UFFDIO_ZEROPAGE": (0, errno.EEXIST),
    "KVM_CREATE_VCPU": (0, errno.EEXIST),
    "KVM_RESET_DIRTY_RINGS": (errno.EINVAL, errno.EINVAL),  # the VM has none
    "KVM_SET_MEMORY_ATTRIBUTES": (errno.ENOTTY, errno.ENOTTY),  # nor private memory
    "KVM_CREATE_TDP_FD": (errno.EEXIST, errno.EEXIST),
    "KVM_REGISTER_NONCOHERENT_DMA": (errno.EBUSY, errno.EBUSY),  # an export stands against it
    "KVM_UNREGISTER_NONCOHERENT_DMA": (errno.EINVAL, errno.EINVAL),
    "KVM_SET_CPUID2": (errno.EINVAL, errno.EINVAL),  # it has run
    "MMAP_DIRTY_RING": (errno.EINVAL, errno.EINVAL),
    "TDP_REGISTER_IMPORTER": (0, errno.EBUSY),
    "TDP_UNPIN": (0, errno.EINVAL),
    "HMM_REGISTER": (errno.EBUSY, errno.EBUSY),
    "HMM_WATCH": (0, errno.EEXIST),
    "HMM_UNWATCH": (0, errno.ENOENT),
    "HMM_FILE_PUT": (0, errno.EINVAL),
    "HMM_CHANGE_PROCESS": (errno.EINVAL, errno.EINVAL),  # it watches a range
    "IOMMU_DESTROY": (0, errno.ENOENT),
    "IOMMU_IOAS_FOLLOW_KVM": (0, errno.EBUSY),
    "IOMMU_IOAS_CHANGE_PROCESS": (errno.EINVAL, errno.EINVAL),  # memory of a process is mapped
    "IOMMU_OPTION": (errno.EBUSY, errno.EBUSY),
    "IOMMU_HWPT_SET_DIRTY_TRACKING": (errno.EOPNOTSUPP, errno.EOPNOTSUPP),
    "IOMMU_HWPT_GET_DIRTY_BITMAP": (errno.EOPNOTSUPP, errno.EOPNOTSUPP),
    "IOMMU_HWPT_INVALIDATE": (errno.ENOENT, errno.ENOENT),
    "VFIO_DEVICE_BIND_IOMMUFD": (errno.EINVAL, errno.EINVAL),
    "VFIO_DEVICE_PIN": (errno.EINVAL, errno.EINVAL),  # it was detached just before
    "VFIO_DEVICE_UNPIN": (errno.EINVAL, errno.EINVAL),
    "VFIO_DEVICE_MMAP": (errno.EBUSY, errno.EBUSY),
    "LINK": (errno.EPERM, errno.EPERM),  # iommufdd has it, and clients never
}
TWICE |= {
    f"guest_memfd {op}": (errno.EINVAL, errno.EINVAL)  # nor is it resized, read or written by its fd
    for op in ("FTRUNCATE", "PREAD", "PWRITE")
}
SLEEPERS = {"READ_EVENT", "TDP_UNREGISTER_IMPORTER"}  # answered when something else happens

# Requests that take an fd: fields with which they look at it, the errno without one, the errno with an fd
# of another kind, and the kinds they take.
TAKES: dict[tuple[str, str], tuple[dict[str, Any], int, int, str]] = {
    ("kvmd", "STATS"): ({}, 0, errno.EINVAL, "kvm-vm"),
    ("kvmd", "TDP_FD_GET"): ({}, errno.EBADF, errno.EINVAL, "tdp_fd"),
    ("kvmd", "HMM_MIRROR_GET"): ({}, errno.EBADF, errno.EINVAL, "mm"),
    ("kvmd", "KVM_FAULT_NOTES_GET"): ({}, errno.EBADF, errno.EINVAL, "kvm-vm"),
    ("kvmd", "INSPECT"): ({"vm": None}, errno.EBADF, errno.EINVAL, "kvm-vm"),
    ("kvmd", "INSPECT_GPA"): ({"vm": None, "gpa": 0}, errno.EBADF, errno.EINVAL, "kvm-vm"),
    ("kvmd", "DUMP_TABLES"): ({"vm": None}, errno.EBADF, errno.EINVAL, "kvm-vm"),
    ("hmm-mirror", "HMM_FILE_GET"): ({}, errno.EBADF, errno.EINVAL, "memfd"),
    ("hmm-mirror", "HMM_CHANGE_PROCESS"): ({}, errno.EBADF, errno.EINVAL, "mm"),
    ("/dev/kvm", "KVM_CREATE_VM"): ({}, errno.EBADF, errno.EINVAL, "mm"),
    ("mm", "MMAP"): ({"size": 4096, "kind": "file_shared"}, errno.EBADF, errno.EINVAL, "memfd guest_memfd"),
    ("kvm-vm", "KVM_SET_USER_MEMORY_REGION2"): ({"flags": 4}, errno.EBADF, errno.EINVAL, "guest_memfd"),
    ("iommufdd", "OPEN"): ({"path": "/dev/iommu"}, 0, 0, "mm"),  # a name is taken from it, nothing else
    ("iommufd", "IOMMU_HWPT_ALLOC"): (
        {"data_type": 3, "data_len": 8, "data_uptr": b"\7".ljust(8, b"\0"), "fd_table": [7]},
        errno.EBADF,
        errno.EINVAL,
        "tdp_fd",
    ),
    # Objects of the zoo in the order they are made: the third is an IOAS, the sixth one on demand.
    ("iommufd", "IOMMU_IOAS_MAP"): (
        {"ioas_id": 3, "flags": 6, "user_va": 1 << 30, "length": 4096},
        errno.EBADF,
        errno.EINVAL,
        "mm",
    ),
    # Two, of which the second is named in `fd_table`; and with nothing mapped there is nobody to ask for one.
    ("iommufd", "IOMMU_IOAS_MAP_FILE"): ({"ioas_id": 3}, errno.EBADF, errno.EBADF, "mm"),
    ("iommufd", "IOMMU_IOAS_CHANGE_PROCESS"): ({}, errno.EBADF, 0, "mm"),
    ("iommufd", "IOMMU_IOAS_FOLLOW_KVM"): ({"ioas_id": 6}, errno.EBADF, errno.EINVAL, "kvm-vm"),
    ("vfio-device", "VFIO_DEVICE_BIND_IOMMUFD"): ({}, errno.EINVAL, errno.EINVAL, "iommufd"),  # it is bound
}

# What VM and vCPU answer when the process is gone, where it is not what they answered before.
AFTER_EXIT = {
    "KVM_GET_DIRTY_LOG": errno.EFAULT,
    "KVM_CLEAR_DIRTY_LOG": errno.EFAULT,
    "KVM_PRE_FAULT_MEMORY": errno.EFAULT,
}


# -- how ---------------------------------------------------------------------------------------------------


def code(number: int) -> str:
    return errno.errorcode.get(number, str(number))


def own_fds(service: Service[Any], op: str) -> int:
    """How many the request itself takes, without the one that names the caller."""
    method = service.methods[op]
    return max(0, method.max_fds - issubclass(method.model, Ioctl))


@asynccontextmanager
async def strangers() -> AsyncIterator[Callable[[int], list[int]]]:
    with tempfile.TemporaryFile() as file:
        yield lambda count: [os.dup(file.fileno()) for _ in range(count)]


def others(zoo: Zoo, kinds: str) -> Iterator[str]:
    return (name for name in zoo.fds if name not in kinds.split())


# -- tests -------------------------------------------------------------------------------------------------


def test_every_request_has_a_row() -> None:
    assert set(REQUESTS) == {(service.name, op) for service, op in OPS}
    assert set(TAKES) == {(service.name, op) for service, op in OPS if own_fds(service, op)}
    ops = {op for _, op in OPS} | {f"{service.name} {op}" for service, op in OPS}
    assert (set(TWICE) | set(AFTER_EXIT) | SLEEPERS) <= ops


async def test_each_request_on_each_fd_of_another_kind_is_unknown(host: Host) -> None:
    async with zoo_of(host) as zoo:
        assert set(zoo.objects) == {service.name for service in SERVICES}
        for other in SERVICES:
            expected = errno.ENODEV if other is TDP_FD else errno.ENOTTY
            foreign = {op for _, op in OPS} - set(other.methods)
            wrong = {op: await zoo.ask(other, op, {}, []) for op in sorted(foreign)}
            assert set(wrong.values()) == {expected}, (other.name, wrong)


async def test_one_fd_more_than_a_request_takes_is_einval(host: Host) -> None:
    async with zoo_of(host) as zoo, strangers() as files:
        for service, op in OPS:
            body, given = REQUESTS[service.name, op](zoo)
            method = service.methods[op]
            more = files(method.most(method.model.model_validate({"op": op, **body})) + 1 - len(given))
            assert await zoo.ask(service, op, body, [*given, *more]) == errno.EINVAL, (service.name, op)


async def test_no_fd_where_one_is_needed_and_any_of_another_kind_is_refused(host: Host) -> None:
    async with zoo_of(host) as zoo, strangers() as files:
        services = {service.name: service for service in SERVICES}
        for (name, op), (changed, missing, wrong, kind) in TAKES.items():
            usual, fds = REQUESTS[name, op](zoo)
            close_all(fds)
            body = {**usual, **changed}
            service = services[name]
            assert await zoo.ask(service, op, body, []) == missing, (name, op)
            answers = {
                other: await zoo.ask(service, op, body, [zoo.copy(other)]) for other in others(zoo, kind)
            }
            answers["a file"] = await zoo.ask(service, op, body, files(1))
            assert set(answers.values()) == {wrong}, (name, op, answers)


async def test_each_request_twice(host: Host) -> None:
    async with zoo_of(host) as zoo:
        got = {}
        for service, op in OPS:
            if op not in SLEEPERS:
                asked = op if service.name != "guest_memfd" else f"guest_memfd {op}"
                got[asked] = await zoo.grant(service, op), await zoo.grant(service, op)
        expected = {asked: TWICE.get(asked, (0, 0)) for asked in got}
        wrong = {asked: pair for asked, pair in got.items() if pair != expected[asked]}
        assert wrong == {}, wrong


@pytest.mark.rfc("RFC-15")
async def test_every_ioctl_of_another_process_is_eio_before_anything_of_it_is_looked_at(host: Host) -> None:
    async with zoo_of(host) as zoo:
        other = await host.kvmd.start_process()
        for service in (VM, VCPU):
            for op in service.methods:
                body, fds = REQUESTS[service.name, op](zoo)
                for argp in (None, 0, (1 << 64) - 1):
                    body |= {"other_mm": True, "argp": argp}
                    answer = await zoo.ask(service, op, body, [*map(os.dup, fds), other.dup()])
                    assert code(answer) == "EIO", (op, argp)
                for given, expected in (([], "EBADF"), ([zoo.copy("kvm-vm")], "EINVAL")):
                    assert code(await zoo.ask(service, op, body, given)) == expected, op
                own = {**body, "argp": None}
                assert await zoo.ask(service, op, own, [zoo.copy("mm")]) != errno.EIO, op
        assert (await host.kvmd.stats())["vms"][-1]["vcpus"] == 2, "only the last row asked as the owner"
        other.close()


async def test_vm_and_vcpu_outlive_their_process_which_has_no_memory_any_more(host: Host) -> None:
    async with zoo_of(host) as zoo:
        zoo.objects["mm"].close()
        await eventually(host.kvmd.stats, lambda s: s["processes"] == 0, "the process is gone")
        for service in (VM, VCPU):
            for op in service.methods:
                expected = AFTER_EXIT.get(op, TWICE.get(op, (0, 0))[0])
                assert code(await zoo.grant(service, op)) == code(expected), op
        assert await zoo.grant(*_of("tdp-importer", "TDP_FAULT")) == errno.EPERM


async def test_what_was_destroyed_detached_or_unbound_is_not_there(host: Host) -> None:
    async with zoo_of(host) as zoo:
        destroy, attach = _of("iommufd", "IOMMU_DESTROY"), _of("vfio-device", "VFIO_DEVICE_ATTACH_IOMMUFD_PT")
        detach = _of("vfio-device", "VFIO_DEVICE_DETACH_IOMMUFD_PT")
        assert await zoo.ask(*destroy, {"id": zoo.ids["kvm"]}, []) == errno.EBUSY
        assert await zoo.ask(*destroy, {"id": zoo.ids["ioas"]}, []) == errno.EBUSY
        assert [await zoo.grant(*detach) for _ in range(2)] == [0, 0]
        assert await zoo.ask(*destroy, {"id": zoo.ids["kvm"]}, []) == 0
        assert await zoo.grant(*attach) == errno.ENOENT
        for op in ("IOMMU_DESTROY", "IOMMU_HWPT_SET_DIRTY_TRACKING", "IOMMU_HWPT_GET_DIRTY_BITMAP"):
            body = {"id" if op == "IOMMU_DESTROY" else "hwpt_id": zoo.ids["kvm"]}
            assert await zoo.ask(*_of("iommufd", op), body, []) == errno.ENOENT
        zoo.objects["iommufd"].close()
        await eventually(host.iommufdd.stats, lambda s: s["devices_bound"] == 0, "the device is unbound")
        for op in ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_DETACH_IOMMUFD_PT", "VFIO_DEVICE_MMAP"):
            assert await zoo.grant(*_of("vfio-device", op)) == errno.EINVAL


async def test_an_importer_of_a_released_tdp_fd_is_told_so(host: Host) -> None:
    async with zoo_of(host) as zoo:
        await zoo.release_tdp_fd()
        for op in ("TDP_GET_METADATA", "TDP_REGISTER_IMPORTER", "TDP_FAULT"):
            assert code(await zoo.grant(*_of("tdp-importer", op))) == "ENODEV", op
        assert await zoo.grant(*_of("tdp-importer", "TDP_UNREGISTER_IMPORTER")) == 0


def _of(name: str, op: str) -> tuple[Service[Any], str]:
    return next((service, op) for service in SERVICES if service.name == name)
