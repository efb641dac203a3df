"""`qemu-shim inspect`: a VM, or one of its addresses, as data and as text; and its dump.

Without running daemons to look at, it looks at a small machine of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from protocol.hw.second_stage import second_stage_fault
from protocol.pt import bits
from protocol.pt.decode import decode
from protocol.pt.ept_exit import EptAccess, ept_exit
from protocol.pt.walk import Outcome, Walk
from protocol.units import MIB, PAGE_SIZE, Level
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import Host, MachineConfig, machine

Seen = dict[str, Any]
DEMO_PAGES = 8


async def inspect(host: Host, number: int | None, gpa: int | None, dump: Path | None) -> Seen:
    """What `--json` prints, for a host's administrator.  Raises UapiError(ENOENT) if there is no such VM."""
    assert host.admin is not None, "the administrator's socket"
    inspector = Inspector(host.admin)
    vm = await inspector.newest() if number is None else number
    seen: Seen = {"vms": await inspector.vms()}
    if gpa is None:
        seen["vm"] = await inspector.vm(vm)
        seen["hwpts"] = (await host.iommufdd.stats())["hwpts"]
    else:
        seen["gpa"] = _decoded(gpa, await inspector.gpa(vm, gpa))
    if dump is not None:
        await inspector.dump(dump, vm)
        seen["dump"] = str(dump)
    return seen


def _decoded(gpa: int, found: Seen) -> Seen:
    names = ("level", "at", "entry")
    path = [dict(zip(names, step, strict=True)) for step in found["path"]]
    for step in path:
        step |= decode(step["entry"], Level(step["level"]))._asdict()
    cpu, unit = (Walk(Outcome(found[who][0]), *found[who][1:]) for who in ("cpu", "unit"))
    return found | {"gpa": gpa, "path": path, "cpu": _by_cpu(cpu, gpa), "unit": _by_unit(unit, gpa)}


def _by_cpu(found: Walk, gpa: int) -> Seen:
    """What each access comes to: None is success."""
    exits = {access: ept_exit(found, access) for access in EptAccess}
    return _end(found, gpa, bits.RWX) | {
        access.name.lower(): ended and f"{ended.reason.name} {ended.qualification:#x}"
        for access, ended in exits.items()
        if access.name
    }


def _by_unit(found: Walk, gpa: int) -> Seen:
    kinds = {"read": (True, False), "write": (False, True)}
    faults = {
        kind: second_stage_fault(found, gpa, read=read, write=write) for kind, (read, write) in kinds.items()
    }
    ends = {kind: reason and reason.name for kind, reason in faults.items()}
    return _end(found, gpa, bits.READ | bits.WRITE) | ends


def _end(found: Walk, gpa: int, meant: int) -> Seen:
    hpa = found.hpa(gpa) if found.outcome is Outcome.MAPPED else None
    rights = "".join(letter for n, letter in enumerate("RWX") if (found.rights & meant) >> n & 1)
    return {"outcome": found.outcome.name.lower(), "hpa": hpa, "rights": rights}


@asynccontextmanager
async def demo(host: Host) -> AsyncIterator[None]:
    """A machine in which the CPU wrote some pages and the device some others."""
    async with machine(host, MachineConfig(ram_bytes=64 * MIB)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        pages = guest.memory.allocate(2 * DEMO_PAGES)
        await guest.memory.touch([pages + n * PAGE_SIZE for n in range(DEMO_PAGES)])
        for n in range(DEMO_PAGES, 2 * DEMO_PAGES):
            await queue.fill(pages + n * PAGE_SIZE, n, PAGE_SIZE)
        yield


# -- as text -------------------------------------------------------------------------------------------


def as_text(seen: Seen) -> Iterator[str]:
    if "vm" in seen:
        yield from _vm_text(seen["vm"])
        for hwpt in seen["hwpts"]:
            yield "  hwpt " + ", ".join(f"{name} {value}" for name, value in hwpt.items())
    if "gpa" in seen:
        yield from _gpa_text(seen["gpa"])
    if "dump" in seen:
        yield f"dumped to {seen['dump']}"


def _vm_text(vm: Seen) -> Iterator[str]:
    yield f"VM {vm['vm']}"
    for slot in vm["slots"]:
        end = slot["gpa"] + slot["size"]
        yield (
            f"  slot {slot['as_id']}:{slot['slot']}  gpa {slot['gpa']:#x}..{end:#x}"
            f"  hva {slot['hva']:#x}  flags {slot['flags']:#x}"
        )
    if vm["slots_total"] > len(vm["slots"]):
        yield f"  and {vm['slots_total'] - len(vm['slots'])} slots more"
    for root in vm["roots"]:
        yield from _root_text(root)
    for tdp in vm["exported"]:
        importers = ", ".join(tdp["importers"]) or "none"
        yield f"  exported as {tdp['as_id']}: root {tdp['root_hpa']:#x}, importers: {importers}"
    widest = max(len(name) for name in vm["stats"])
    for name, value in vm["stats"].items():
        yield f"  {name:<{widest}}  {value}"


def _root_text(root: Seen) -> Iterator[str]:
    marks = "".join(f", {mark}" for mark in ("exported", "invalid") if root[mark])
    yield f"  root {root['hpa']:#x}  {root['levels']} levels, as {root['as_id']}, refs {root['refs']}{marks}"
    leaves = " ".join(f"{size} {n}" for size, n in zip(("4K", "2M", "1G"), root["leaves"], strict=True))
    yield f"    leaves {leaves}  tables {root['tables']}  A/D bits {'on' if root['ad_enabled'] else 'off'}"


def _gpa_text(found: Seen) -> Iterator[str]:
    yield f"gpa {found['gpa']:#x}  root {found['root_hpa']:#x}  {found['levels']} levels"
    for step in found["path"]:
        target = f"{step['kind']} {step['address']:#x}" if step["address"] else step["kind"]
        yield f"  level {step['level']}  at {step['at']:#x}  {step['entry']:#018x}  {target}"
        for reader in ("cpu", "unit", "kvm"):
            if step[reader]:
                yield f"    {reader:<5} {' '.join(step[reader])}"
    for reader in ("cpu", "unit"):
        yield f"  {reader}: {_verdict_text(found[reader])}"


def _verdict_text(verdict: Seen) -> str:
    where = "" if verdict["hpa"] is None else f" to hpa {verdict['hpa']:#x} {verdict['rights']}"
    failing = [f"{what} {verdict[what]}" for what in ("read", "write", "fetch") if verdict.get(what)]
    return ", ".join([verdict["outcome"] + where, *failing])
