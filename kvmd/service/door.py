"""kvmd's front door and /dev/kvm: where processes begin and VMs are made.

The front door stands for the host itself; whoever connects can start a process, open a device node, and
present a TDP FD as an importer, or an mm fd as another MMU of that process.
"""

from __future__ import annotations

import errno
from dataclasses import asdict

from kvmd.config import Settings
from kvmd.core.capability import check_extension
from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.stats import vm_stats
from kvmd.core.vm import VmType, create_vm
from kvmd.service.fault_notes import FAULT_NOTES, NotesFile
from kvmd.service.hmm import open_mirror
from kvmd.service.inspect import INSPECT
from kvmd.service.mm import open_mm
from kvmd.service.objects import App, Importer, MmFile, TdpFile, VmFile
from kvmd.service.tdp_fd import IMPORTER, importer_closed
from kvmd.service.vm import VM
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.door import Door
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import hmm, names
from protocol.uapi import kvm as uapi
from protocol.uapi import tdp_fd as tdp


class Kvmd:
    """The daemon: what it holds, behind its socket."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.app = App(loop, settings)
        self.door = Door(loop, FRONT_DOOR, self.app)

    async def start(self) -> None:
        """kvmd needs nobody."""

    def close(self) -> None:
        self.door.close()
        self.app.close()


def _get_api_version(app: App, message: uapi.KvmGetApiVersion, fds: Fds) -> Body:
    return {"ret": names.KVM_API_VERSION}


async def _create_vm(app: App, message: uapi.KvmCreateVm, fds: Fds) -> Answer:
    if message.type not in set(VmType):
        raise UapiError(errno.EINVAL, f"KVM_CREATE_VM type {message.type}: {[int(kind) for kind in VmType]}")
    held = app.files.find(fds.peek(0), MmFile)
    owner = VmFile(app, await create_vm(app.host, held.mm, VmType(message.type)))
    app.vms.append(owner.vm)
    fd, _, _ = app.files.open(VM, owner, app.put_vm)
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


def _tdp_fd_get(app: App, message: tdp.TdpFdGet, fds: Fds) -> Answer:
    importer = Importer(app.files.find(fds.peek(0), TdpFile))
    fd, _, importer.channel = app.files.open(IMPORTER, importer, importer_closed)
    return Answer({}, [fd])


def _hmm_mirror_get(app: App, message: hmm.HmmMirrorGet, fds: Fds) -> Answer:
    return Answer({}, [open_mirror(app, app.files.find(fds.peek(0), MmFile).mm)])


def _fault_notes_get(app: App, message: uapi.KvmFaultNotesGet, fds: Fds) -> Answer:
    notes = NotesFile(app.files.find(fds.peek(0), VmFile).vm.fault_notes)
    fd, _, notes.channel = app.files.open(FAULT_NOTES, notes, NotesFile.closed)
    return Answer({}, [fd])


def _stats(app: App, message: uapi.Stats, fds: Fds) -> Body:
    return {
        "vms": [vm_stats(vm) for vm in app.vms],
        "processes": len(app.mms),
        "frames": app.host.frames.in_use,
        "table_pages": app.host.pool.in_use,
        "memory": asdict(app.host.memory.counters),
    }


def _check(app: App, message: uapi.Check, fds: Fds) -> Body:
    found = check_memory(app.host.memory, app.host.processes)
    return {"violations": found + [violation for vm in app.vms for violation in check_vm(vm)]}


FRONT_DOOR: Service[App] = Service(
    "kvmd",
    {
        "OPEN": Method(uapi.Open, _open),
        "MM_CREATE": Method(uapi.MmCreate, _mm_create),
        "TDP_FD_GET": Method(tdp.TdpFdGet, _tdp_fd_get, 1),
        "HMM_MIRROR_GET": Method(hmm.HmmMirrorGet, _hmm_mirror_get, 1),
        "KVM_FAULT_NOTES_GET": Method(uapi.KvmFaultNotesGet, _fault_notes_get, 1),
        "STATS": Method(uapi.Stats, _stats),
        "CHECK": Method(uapi.Check, _check),
        **INSPECT,
    },
)
