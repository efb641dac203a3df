"""kvmd's doors and /dev/kvm: where processes begin and VMs are made.

The front door stands for the host itself: whoever connects can start a process, open a device node, and
look at the VMs whose fds he has.  What reaches into other VMs has doors of its own: the administrator's, and
the one for importers (`importer_door.py`).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from kvmd.config import Settings
from kvmd.core.capability import check_extension
from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.stats import vm_stats
from kvmd.core.vm import Kvm, VmType
from kvmd.service.importer_door import IMPORTER_DOOR, IMPORTS, NOTES, REFUSED
from kvmd.service.inspect import any_vm, inspecting, own_vm
from kvmd.service.mm import open_mm
from kvmd.service.objects import App, MmFile, VmFile
from kvmd.service.vm import VM
from protocol.daemon import tell_options
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.door import Door
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import kvm as uapi
from protocol.uapi import names
from protocol.uapi.message import MAX_TOLD, StartedWith, as_told

log = structlog.get_logger("kvmd")


class Kvmd:
    """The daemon: what it holds, behind its sockets."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.app = App(loop, settings)
        self.trusting = settings.trust_importers
        self.door = Door(loop, TRUSTING_DOOR if self.trusting else FRONT_DOOR, self.app)
        private = {settings.importer_socket: IMPORTER_DOOR, settings.admin_socket: ADMIN_DOOR}
        self.private_doors: Mapping[Path, Door[Any]] = {
            path: Door(loop, service, self.app) for path, service in private.items() if path is not None
        }

    async def start(self) -> None:
        """kvmd needs nobody."""
        if self.trusting:
            log.warning("importers are trusted: every client may have itself lent the memory of all VMs")

    def close(self) -> None:
        for door in (self.door, *self.private_doors.values()):
            door.close()
        self.app.close()


def _get_api_version(app: App, message: uapi.KvmGetApiVersion, fds: Fds) -> Body:
    return {"ret": names.KVM_API_VERSION}


async def _create_vm(app: App, message: uapi.KvmCreateVm, fds: Fds) -> Answer:
    if message.type not in set(VmType):
        raise UapiError(errno.EINVAL, f"KVM_CREATE_VM type {message.type}: {[int(kind) for kind in VmType]}")
    held = app.files.find(fds.peek(0), MmFile)
    owner = VmFile(app, *await app.vms.create(held.mm, VmType(message.type)))
    fd, _, _ = app.files.open(VM, owner, lambda closed: closed.users.put())
    return Answer({}, [fd])


def _check_extension(app: App, message: uapi.KvmCheckExtension, fds: Fds) -> Body:
    return {"ret": check_extension(app.host.features, None, message.cap)}


DEV_KVM: Service[App] = Service(
    "/dev/kvm",
    {
        "KVM_GET_API_VERSION": Method(uapi.KvmGetApiVersion, _get_api_version),
        "KVM_CHECK_EXTENSION": Method(uapi.KvmCheckExtension, _check_extension),
        "KVM_CREATE_VM": Method(uapi.KvmCreateVm, _create_vm, 1),
    },
)


def _open(app: App, message: uapi.Open, fds: Fds) -> Answer:
    if message.path != names.KVM_PATH:
        raise UapiError(errno.ENOENT, f"open {message.path!r}: here is only {names.KVM_PATH}")
    fd, _, _ = app.files.open(DEV_KVM, app)
    return Answer({}, [fd])


def _mm_create(app: App, message: uapi.MmCreate, fds: Fds) -> Answer:
    return Answer({}, [open_mm(app, app.host.create_mm())])


def _stats(app: App, message: uapi.Stats, fds: Fds) -> Body:
    return _stats_of(app, [app.files.find(fds.peek(n), VmFile).vm for n in range(len(fds))])


def _stats_of_all(app: App, message: uapi.StatsOfAll, fds: Fds) -> Body:
    beyond = (vm for vm in app.vms if vm.id > message.after)  # in the order of their numbers
    return _stats_of(app, list(islice(beyond, MAX_TOLD)))


def _stats_of(app: App, vms: list[Kvm]) -> Body:
    return {
        "vms": [vm_stats(vm) for vm in vms],
        "vm_count": len(app.vms),
        "processes": len(app.mms),
        "frames": app.host.frames.in_use,
        "table_pages": app.host.pool.in_use,
        "memory": asdict(app.host.memory.counters),
    }


def _check(app: App, message: uapi.Check, fds: Fds) -> Body:
    found = check_memory(app.host.memory, app.host.processes)
    return {"violations": as_told(found + [violation for vm in app.vms for violation in check_vm(vm)])}


_CHECK: dict[str, Method[App, Any]] = {"CHECK": Method(uapi.Check, _check)}
_CLIENTS: dict[str, Method[App, Any]] = {
    "OPEN": Method(uapi.Open, _open),
    "MM_CREATE": Method(uapi.MmCreate, _mm_create),
    "STATS": Method(uapi.Stats, _stats, uapi.MAX_VMS_TOLD),
    "STARTED_WITH": Method(StartedWith, tell_options),
    **_CHECK,
    **NOTES,
    **inspecting(own_vm),
}

FRONT_DOOR: Service[App] = Service("kvmd", {**_CLIENTS, **REFUSED})
TRUSTING_DOOR: Service[App] = Service("kvmd", {**_CLIENTS, **IMPORTS})
ADMIN_DOOR: Service[App] = Service(
    "kvmd-admin", {"STATS": Method(uapi.StatsOfAll, _stats_of_all), **_CHECK, **inspecting(any_vm)}
)
