"""Looking at VMs through the front door: requests of `protocol/uapi/inspect.py`."""

from __future__ import annotations

import errno
import os
from typing import Any

from kvmd.core.inspect import Run, describe, look_up, make_probes, root_of, table_runs
from kvmd.core.vm import Kvm
from kvmd.service.objects import App, VmFile
from protocol.errors import UapiError
from protocol.pt.mem import TableReader
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method
from protocol.uapi import inspect as uapi
from protocol.units import PAGE_SIZE, Gpa


def _find(app: App, number: int | None, fds: Fds) -> Kvm:
    if number is None:
        return app.files.find(fds.peek(0), VmFile).vm
    for vm in app.vms:
        if vm.id == number:
            return vm
    raise UapiError(errno.ENOENT, f"there is no VM {number}")


def _inspect(app: App, message: uapi.Inspect, fds: Fds) -> Body:
    return describe(_find(app, message.vm, fds), uapi.MAX_SLOTS_TOLD)


def _inspect_gpa(app: App, message: uapi.InspectGpa, fds: Fds) -> Body:
    return look_up(_find(app, message.vm, fds), Gpa(message.gpa))


def _dump_tables(app: App, message: uapi.DumpTables, fds: Fds) -> Answer:
    vm = _find(app, message.vm, fds)
    root = root_of(vm)
    runs = table_runs(app.host.writer, root)
    body = {
        "root_hpa": root.hpa,
        "levels": root.role.level,
        "runs": [list(run) for run in runs],
        "probes": [list(probe) for probe in make_probes(vm, root, message.probes)],
    }
    return Answer(body, [_copy(app.host.writer, runs)])


def _copy(tables: TableReader, runs: list[Run]) -> int:
    """The runs' pages, one run after the other, in a file of their own.  ENOMEM, EMFILE."""
    try:
        fd = os.memfd_create("tdp-dump", os.MFD_CLOEXEC)
    except OSError as error:
        raise UapiError(error.errno or errno.EMFILE, "no file for a dump") from None
    try:
        with open(fd, "wb", closefd=False) as file:
            for run in runs:
                file.write(tables.pages(run.base, run.pages))
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        size = sum(run.pages for run in runs) * PAGE_SIZE
        raise UapiError(error.errno or errno.ENOMEM, f"no memory for a dump of {size} bytes") from None
    return fd


INSPECT: dict[str, Method[App, Any]] = {
    "INSPECT": Method(uapi.Inspect, _inspect, 1),
    "INSPECT_GPA": Method(uapi.InspectGpa, _inspect_gpa, 1),
    "DUMP_TABLES": Method(uapi.DumpTables, _dump_tables, 1),
}
