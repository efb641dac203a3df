"""Looking at VMs: requests of `protocol/uapi/inspect.py`, by a VM's fd, or by its number for the
administrator.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmd.core.inspect import TableRun, describe, look_up, make_probes, root_of, table_runs
from kvmd.core.vm import Kvm
from kvmd.service.objects import App, VmFile
from protocol.errors import UapiError
from protocol.kernel.asked import refusal
from protocol.kernel.port import Kernel
from protocol.pt.mem import TableReader
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method
from protocol.uapi import inspect as uapi
from protocol.units import PAGE_SIZE, Gpa

Find = Callable[[App, int | None, Fds], Kvm]


def own_vm(app: App, number: int | None, fds: Fds) -> Kvm:
    """Whoever has its fd.  EPERM: by its number."""
    if number is not None:
        raise UapiError(errno.EPERM, f"VM {number} by its number: send its fd, or come by --admin-socket")
    return app.files.find(fds.peek(0), VmFile).vm


def any_vm(app: App, number: int | None, fds: Fds) -> Kvm:
    """For the administrator.  ENOENT."""
    if number is None:
        return own_vm(app, None, fds)
    for vm in app.vms:
        if vm.id == number:
            return vm
    raise UapiError(errno.ENOENT, f"there is no VM {number}")


def _by_fd(message: uapi.Inspect | uapi.InspectGpa | uapi.DumpTables) -> int:
    return int(message.vm is None)


def inspecting(find: Find) -> dict[str, Method[App, Any]]:
    """The requests, of the VMs that `find` finds."""

    def inspect(app: App, message: uapi.Inspect, fds: Fds) -> Body:
        return describe(find(app, message.vm, fds), uapi.MAX_SLOTS_TOLD)

    def inspect_gpa(app: App, message: uapi.InspectGpa, fds: Fds) -> Body:
        return look_up(find(app, message.vm, fds), Gpa(message.gpa))

    def dump_tables(app: App, message: uapi.DumpTables, fds: Fds) -> Answer:
        return _dump(app, find(app, message.vm, fds), message.probes)

    return {
        "INSPECT": Method(uapi.Inspect, inspect, 1, _by_fd),
        "INSPECT_GPA": Method(uapi.InspectGpa, inspect_gpa, 1, _by_fd),
        "DUMP_TABLES": Method(uapi.DumpTables, dump_tables, 1, _by_fd),
    }


def _dump(app: App, vm: Kvm, probes: int) -> Answer:
    root = root_of(vm)
    runs = table_runs(app.host.writer, root)
    body = {
        "root_hpa": root.hpa,
        "levels": root.role.level,
        "runs": [list(run) for run in runs],
        "probes": [list(probe) for probe in make_probes(vm, root, probes)],
    }
    return Answer(body, [_copy(app.kernel, app.host.writer, runs)])


def _copy(kernel: Kernel, tables: TableReader, runs: list[TableRun]) -> int:
    """The runs' pages, one run after the other, in a file of their own.  ENOMEM, EMFILE."""
    try:
        return kernel.file_with("tdp-dump", (tables.pages(run.base, run.pages) for run in runs))
    except OSError as error:
        size = sum(run.pages for run in runs) * PAGE_SIZE
        raise refusal(error, f"no room for a dump of {size} bytes") from None
