"""What can be asked of kvmd about its VMs: thin names over the requests of `protocol/uapi/inspect.py`.

A VM is named by its fd or, over the administrator's socket, by its number.  A dump becomes two files,
TABLES.bin and TABLES.json, whose form is in docs/decisions/0010.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from protocol.errors import UapiError
from protocol.rpc.channel import Body, Channel, Reply
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.stats import ask_all

Named = Vm | int  # an fd of ours, or a number

BINARY, METADATA = "TABLES.bin", "TABLES.json"


class Inspector:
    def __init__(self, kvmd: Channel) -> None:
        self._kvmd = kvmd

    async def vms(self) -> list[int]:
        """The numbers of the VMs, oldest first."""
        _, vms = await ask_all(self._kvmd, "vms", "vm")
        return [vm["vm"] for vm in vms]

    async def newest(self) -> int:
        """ENOENT: there is no VM."""
        vms = await self.vms()
        if not vms:
            raise UapiError(errno.ENOENT, "kvmd has no VM")
        return vms[-1]

    async def vm(self, vm: Named) -> Body:
        return (await self._ask("INSPECT", vm)).body

    async def gpa(self, vm: Named, gpa: int) -> Body:
        return (await self._ask("INSPECT_GPA", vm, gpa=gpa)).body

    async def dump(self, directory: Path, vm: Named) -> None:
        """Write the table of the VM into `directory`, which is made if it is not there."""
        reply = await self._ask("DUMP_TABLES", vm)
        write_dump(directory, as_document(reply.body), reply.fds.take(0))

    async def tables(self, vm: Named) -> bytes:
        """Every page of the table of the VM, one after the other."""
        return self._kvmd.loop.kernel.contents((await self._ask("DUMP_TABLES", vm)).fds.take(0))

    async def _ask(self, op: str, vm: Named, **body: Any) -> Reply:
        number, fds = (vm, []) if isinstance(vm, int) else (None, [vm.dup()])
        return await self._kvmd.ask(op, {"vm": number, **body}, fds)


def write_dump(directory: Path, document: dict[str, Any], pages: int) -> None:
    """`pages` is the file they are in; it is closed."""
    with open(pages, "rb") as source:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / BINARY).open("wb") as target:
            shutil.copyfileobj(source, target)
    (directory / METADATA).write_text(_as_lines(document), encoding="utf-8")


def _as_lines(document: dict[str, Any]) -> str:
    """A probe a line."""
    fields = []
    for name, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def as_document(body: Body) -> dict[str, Any]:
    """TABLES.json of a reply to DUMP_TABLES."""
    regions, offset = [], 0
    for base, pages in body["runs"]:
        length = pages * PAGE_SIZE
        regions.append({"base_hpa": base, "file": BINARY, "offset": offset, "length": length})
        offset += length
    names = ("gpa", "expect_hpa", "readable", "writable", "page_size")
    return {
        "root_hpa": body["root_hpa"],
        "levels": body["levels"],
        "regions": regions,
        "probes": [dict(zip(names, probe, strict=True)) for probe in body["probes"]],
    }
