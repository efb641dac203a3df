"""Import layers: who may import whom, and which modules stay pure.

The tables below are the rule; a new file under `protocol/` must be given its place in them.
"""

from __future__ import annotations

import pytest

from tests.tidy.source import (
    DAEMONS,
    PRODUCT,
    Checker,
    Import,
    Module,
    hold,
    imports,
    modules,
    product,
    snippet,
)

RANK = {
    "protocol": 0,
    **dict.fromkeys(DAEMONS, 1),
    "vfio_user": 1,
    "simulator": 2,
    "guest": 2,
    "bench": 3,
    "tests": 3,
}

# The one front door for people leads upwards, too.
FRONT_DOOR = ("qemu_shim.cli", "simulator.command")

# Inside protocol: a part may import its own tier's and every lower one, but uapi and rpc not each other.
TIER = {
    **dict.fromkeys(("units", "errors", "flow", "lifecycle", "kvm_run", "hva_index"), 0),
    **dict.fromkeys(("pt", "hw", "hostmem", "trace", "frame_tags", "log", "started_with", "kernel"), 1),
    **dict.fromkeys(("uapi", "rpc", "options"), 2),
    "daemon": 3,
}
APART = ({"uapi", "rpc"},)

# Inside qemu_shim: a wing may import what stands before it, the study's rooms each other only downwards.
WINGS = (
    *("guest", "vmm", "scenarios", "api", "scenarios.series"),
    *("study.workloads", "study.compare", "study.campaign", "study.command"),
    *("commands", "cli", "__main__"),
)

# What a core may take from protocol. A name covers everything below it.
ANY_CORE = ("units", "errors", "flow", "lifecycle", "trace", "hva_index")
VTD_RECORDS = (
    *("hw.caps", "hw.fields", "hw.context_entry", "hw.pasid_entry", "hw.prq", "hw.qi", "hw.faults"),
    *("hw.vtd_regs", "hw.register_page"),
)
OWN_TABLES = ("meta", "bits", "geometry", "mem", "format", "second_stage", "cursor", "table_pool", "check")
CORE_MAY_USE = {
    "kvmd": (*ANY_CORE, "kvm_run", "pt", "hostmem", "frame_tags"),
    # It fills second-stage tables of its own, and leaves walking to the unit.
    "iommufdd": (*ANY_CORE, *VTD_RECORDS, *(f"pt.{name}" for name in OWN_TABLES)),
    "device_sim": (*ANY_CORE, "hw", "hostmem", "pt", "frame_tags"),
    "vfio_user": ANY_CORE,
    "qemu_shim": (*ANY_CORE, "hw.dsa", "hw.dsa_regs", "hw.fields"),
}
# What in pt only the owner of a table may hold: kvmd of the shared one, iommufdd of its own.
WRITERS = {"TableWriter", "TablePool"}
OWNERS = ("kvmd", "iommufdd")

RPC_SHELL = (
    "body",
    "channel",
    "door",
    "fence",
    "files",
    "lease",
    "loop",
    "service",
    "socket",
)
SHELL_OF_PROTOCOL = ("uapi", "kernel", *(f"rpc.{shell}" for shell in RPC_SHELL), "daemon", "log")
IMPURE = {
    *("trio", "msgpack", "pydantic", "structlog"),
    *("asyncio", "threading", "subprocess", "multiprocessing", "signal"),
    *("socket", "select", "selectors", "os", "time", "secrets", "importlib"),
}


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def is_pure(name: str) -> bool:
    """Does the module promise to do no input or output, and to ask neither clock nor chance?"""
    top, _, rest = name.partition(".")
    if top == "protocol":
        return not under(rest, SHELL_OF_PROTOCOL)
    if top == "simulator":
        return under(rest, ("search",))
    return rest.partition(".")[0] == "core" or (top == "qemu_shim" and under(rest, ("guest",)))


def named(imported: Import) -> list[str]:
    """The dotted names that an import may stand for."""
    return [imported.target, *([f"{imported.target}.{imported.item}"] if imported.item else [])]


def check_packages(module: Module) -> list[str]:
    """protocol <- daemons <- simulator <- tests, bench; no daemon imports another.  FRONT_DOOR aside."""
    own = module.path.parts[0]
    return [
        module.at(imported.line, f"{own} may not import {imported.root}")
        for imported in imports(module)
        if imported.root != own != "tests"
        and RANK.get(imported.root, -1) >= RANK.get(own, RANK["bench"])
        and (module.name, imported.target) != FRONT_DOOR
    ]


def part_of(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def check_inside_protocol(module: Module) -> list[str]:
    """What is of tier 0 <- pt, hw, hostmem, trace, ... <- uapi | rpc <- daemon."""
    own = part_of(module.name)
    if module.path.parts[0] != "protocol" or not own:
        return []
    if own not in TIER:
        return [module.at(1, f"protocol.{own} has no tier: give it one in {__name__}")]
    found = []
    for imported in imports(module):
        if imported.root != "protocol":
            continue
        other = part_of(imported.target) or imported.item or ""
        if other == own:
            continue
        if other not in TIER:
            found.append(module.at(imported.line, f"protocol.{other} has no tier"))
        elif TIER[other] > TIER[own] or {own, other} in APART:
            found.append(module.at(imported.line, f"protocol.{own} may not import protocol.{other}"))
    return found


def wing_of(name: str) -> int:
    """Its place in WINGS, the innermost's; -1: it is none of qemu_shim's, or the package itself."""
    rest = name.removeprefix("qemu_shim.")
    around = [wing for wing in WINGS if rest != name and under(rest, (wing,))]
    return WINGS.index(max(around, key=len)) if around else -1


def check_inside_qemu_shim(module: Module) -> list[str]:
    """guest <- vmm <- scenarios <- api <- scenarios.series <- study <- cli; study: workloads <- compare <-
    campaign <- command.
    """
    own = wing_of(module.name)
    if module.path.parts[0] != "qemu_shim" or module.path.name == "__init__.py":
        return []
    if own < 0:
        return [module.at(1, f"{module.name} has no wing: give it one in {__name__}")]
    reached = [(imported, max(map(wing_of, named(imported)))) for imported in imports(module)]
    return [
        module.at(imported.line, f"{WINGS[own]} may not import {WINGS[other]}")
        for imported, other in reached
        if other > own
    ]


def check_pure(module: Module) -> list[str]:
    """A pure module reaches neither the outside world nor a module that does."""
    if not is_pure(module.name):
        return []
    found = []
    for imported in imports(module):
        if imported.root in IMPURE:
            found.append(module.at(imported.line, f"a pure module may not import {imported.root}"))
        elif imported.root == "random" and imported.item != "Random":
            found.append(module.at(imported.line, "chance is an argument: only `from random import Random`"))
        elif imported.root in PRODUCT and not reaches_pure(imported):
            found.append(module.at(imported.line, f"{named(imported)[-1]} is not pure"))
    return found


def reaches_pure(imported: Import) -> bool:
    if imported.root == "protocol":
        return all(is_pure(name) for name in named(imported))
    return any(is_pure(name) for name in named(imported))


def check_core_imports(module: Module) -> list[str]:
    """A core takes from protocol what its row says."""
    own = module.path.parts[0]
    if own not in CORE_MAY_USE or not is_pure(module.name):
        return []
    found = []
    for imported in imports(module):
        if imported.root != "protocol":
            continue
        names = [name.removeprefix("protocol").removeprefix(".") for name in named(imported)]
        if not any(under(name, CORE_MAY_USE[own]) for name in names):
            found.append(module.at(imported.line, f"{own}'s core may not use {names[-1] or 'protocol'}"))
        if own not in OWNERS and imported.item in WRITERS:
            found.append(module.at(imported.line, f"{own} writes no tables: {imported.item}"))
    return found


CHECKERS = (check_packages, check_inside_protocol, check_inside_qemu_shim, check_pure, check_core_imports)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_every_import_goes_down(checker: Checker) -> None:
    hold(checker, modules() if checker is check_packages else product())


@pytest.mark.parametrize(
    ("checker", "path", "text"),
    [
        (check_packages, "protocol/units.py", "import kvmd.core.vm"),
        (check_packages, "kvmd/service/vm.py", "def late():\n    from iommufdd import service"),
        (check_packages, "kvmd/service/vm.py", "import simulator"),
        (check_packages, "qemu_shim/cli.py", "from tests.oracle import table"),
        (check_packages, "bench/__main__.py", "import tests"),
        (check_packages, "iommufdd/core/qi.py", "import bench"),
        (check_inside_protocol, "protocol/units.py", "from protocol.pt import bits"),
        (check_inside_protocol, "protocol/pt/walk.py", "from protocol import uapi"),
        (check_inside_protocol, "protocol/rpc/service.py", "from protocol.uapi.kvm import Fault"),
        (check_inside_protocol, "protocol/uapi/kvm.py", "from ..rpc import session"),
        (check_inside_protocol, "protocol/surprise.py", ""),
        (check_inside_qemu_shim, "qemu_shim/guest/idxd.py", "from qemu_shim.vmm import machine"),
        (check_inside_qemu_shim, "qemu_shim/vmm/machine.py", "import qemu_shim.scenarios.series.library"),
        (check_inside_qemu_shim, "qemu_shim/scenarios/context.py", "from qemu_shim import api"),
        (check_inside_qemu_shim, "qemu_shim/api.py", "from qemu_shim.scenarios.series import mmio"),
        (
            check_inside_qemu_shim,
            "qemu_shim/scenarios/x.py",
            "from qemu_shim.study import campaign",
        ),
        (check_inside_qemu_shim, "qemu_shim/study/compare/x.py", "from qemu_shim.study import campaign"),
        (check_inside_qemu_shim, "qemu_shim/surprise.py", ""),
        (check_pure, "kvmd/core/vm.py", "import trio"),
        (check_pure, "kvmd/core/deep/vm.py", "from os import path"),
        (check_pure, "protocol/trace.py", "import time"),
        (check_pure, "protocol/rpc/session.py", "import msgpack"),
        (check_pure, "protocol/rpc/session.py", "from protocol.rpc.channel import Channel"),
        (check_pure, "qemu_shim/guest/dmatest.py", "import random"),
        (check_pure, "qemu_shim/guest/dmatest.py", "from random import randrange"),
        (check_pure, "kvmd/core/vm.py", "from kvmd.service import Service"),
        (check_pure, "iommufdd/core/qi.py", "from protocol.uapi import link"),
        (check_pure, "iommufdd/core/qi.py", "from protocol import daemon"),
        (check_pure, "simulator/search/option.py", "import time"),
        (check_core_imports, "iommufdd/core/qi.py", "from protocol.pt.walk import walk"),
        (check_core_imports, "qemu_shim/guest/idxd.py", "from protocol.hw import vtd"),
        (check_core_imports, "device_sim/core/dmar.py", "from protocol.pt.mem import TableWriter"),
    ],
)
def test_an_import_going_up_is_seen(checker: Checker, path: str, text: str) -> None:
    assert len(checker(snippet(path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "kvmd/core/vm.py",
            "from random import Random\nfrom protocol.pt import bits\nimport kvmd.core.tables.spte",
        ),
        (
            "kvmd/service/vm.py",
            "import os, trio\nfrom protocol.uapi import kvm\nfrom kvmd.core.vm import Kvm",
        ),
        (
            "protocol/daemon.py",
            "import os\nfrom protocol.rpc import service\nfrom protocol.uapi import kvm",
        ),
        ("protocol/rpc/channel.py", "import socket\nfrom protocol.rpc.session import Session"),
        ("device_sim/core/dmar.py", "from protocol.pt.walk import walk\nfrom protocol.hw import vtd"),
        ("tests/unit/kvmd/test_vm.py", "import bench\nimport kvmd\nfrom tests.oracle import table"),
        ("bench/__main__.py", "import os\nimport kvmd\nfrom protocol import units"),
    ],
)
def test_an_import_going_down_is_let_pass(path: str, text: str) -> None:
    assert [found for checker in CHECKERS for found in checker(snippet(path, text))] == []
