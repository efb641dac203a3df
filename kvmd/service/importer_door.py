"""The door for the IOMMU's driver: who presents a TDP FD, a process's fd or a VM's here becomes an importer.

An importer is lent windows on the memory of all VMs, as a driver in the kernel reaches all memory.  So it is
the door that is trusted, not the fd: clients are given another one, where the same is EPERM
(docs/decisions/0014).
"""

from __future__ import annotations

import errno
from typing import Any

from kvmd.core.export.importer import Importer
from kvmd.service.fault_notes import FAULT_NOTES, NotesFile
from kvmd.service.hmm import open_mirror
from kvmd.service.objects import App, ImporterFile, MmFile, TdpFile, VmFile
from kvmd.service.tdp_fd import IMPORTER, importer_closed
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import hmm, kvm
from protocol.uapi import tdp_fd as tdp


def _tdp_fd_get(app: App, message: tdp.TdpFdGet, fds: Fds) -> Answer:
    held = ImporterFile(app, Importer(app.files.find(fds.peek(0), TdpFile).tdp))
    fd, _, held.channel = app.files.open(IMPORTER, held, importer_closed)
    return Answer({}, [fd])


def _hmm_mirror_get(app: App, message: hmm.HmmMirrorGet, fds: Fds) -> Answer:
    return Answer({}, [open_mirror(app, app.files.find(fds.peek(0), MmFile).mm)])


def _fault_notes_get(app: App, message: kvm.KvmFaultNotesGet, fds: Fds) -> Answer:
    notes = NotesFile(app.files.find(fds.peek(0), VmFile).vm.fault_notes)
    fd, _, notes.channel = app.files.open(FAULT_NOTES, notes, NotesFile.closed)
    return Answer({}, [fd])


def _refuse(app: App, message: tdp.TdpFdGet | hmm.HmmMirrorGet, fds: Fds) -> Body:
    raise UapiError(
        errno.EPERM,
        f"{message.op}: an importer is lent the memory of all VMs, and this door is for clients: "
        "come by kvmd's --importer-socket",
    )


# Who has a VM's fd may hear of its faults: that lends nothing.
NOTES: dict[str, Method[App, Any]] = {
    "KVM_FAULT_NOTES_GET": Method(kvm.KvmFaultNotesGet, _fault_notes_get, 1)
}
IMPORTS: dict[str, Method[App, Any]] = {
    "TDP_FD_GET": Method(tdp.TdpFdGet, _tdp_fd_get, 1),
    "HMM_MIRROR_GET": Method(hmm.HmmMirrorGet, _hmm_mirror_get, 1),
}
REFUSED: dict[str, Method[App, Any]] = {
    "TDP_FD_GET": Method(tdp.TdpFdGet, _refuse, 1),
    "HMM_MIRROR_GET": Method(hmm.HmmMirrorGet, _refuse, 1),
}

IMPORTER_DOOR: Service[App] = Service("kvmd-importers", {**IMPORTS, **NOTES})
