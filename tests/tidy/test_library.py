"""The library's own scenarios and workloads are written with what everybody is offered: `qemu_shim/api.py`.

What one of them takes besides is listed here with the reason why it is no part of the front door.
"""

from __future__ import annotations

import ast

import pytest

from tests.tidy.source import Checker, Module, hold, imports, product, snippet

LIBRARY = ("qemu_shim.scenarios.series", "qemu_shim.study.workloads")
API = "qemu_shim.api"
BESIDE = {
    "qemu_shim.guest": "programs that run in the guest: the kernel's DMA test, and the driver that resumes",
    "qemu_shim.scenarios.files": "the workloads' list tells one of its own from a file's",
}
# The doors in the front door, and who goes through, to show what a VMM's user has no business with.
DOORS = ("machine", "host", "plugged")
BEHIND = {
    "qemu_shim.scenarios.series.coherency": "IOMMUFD's and KVM's refusals, by their own ioctls",
    "qemu_shim.scenarios.series.dmatest": "the DMA test has the guest's allocator, as a kernel thread has",
    "qemu_shim.scenarios.series.dsa_ops": "how many devices there are, which only device_sim knows",
    "qemu_shim.scenarios.series.memory": "a fork, a file's hole and KSM: what a VMM never asks for",
    "qemu_shim.scenarios.series.mmio": "the exits of a vCPU that a guest's code never sees",
    "qemu_shim.scenarios.series.msi": "interrupt messages as the VMM gets them",
    "qemu_shim.scenarios.series.nested": "IOMMUFD's refusals, by its own ioctls",
    "qemu_shim.scenarios.series.pinning": "VFIO's pins of single pages, and KVM's log as the driver reads it",
    "qemu_shim.scenarios.series.smm": "the other address space, which has neither slots nor CPUs of the API",
    "qemu_shim.scenarios.series.unmap": "a memslot that goes while its memory stays",
    "qemu_shim.scenarios.series.write_tracking": "page tracking, which is KVM's inside",
    "qemu_shim.study.workloads.host_memory": "a process of somebody else's, beside the VMM's",
}


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name.startswith(package + ".") for package in packages)


def check_imports(module: Module) -> list[str]:
    """Of qemu_shim a scenario of the library imports the front door, and others of its own room."""
    if not within(module.name, LIBRARY):
        return []
    own = tuple(package for package in LIBRARY if within(module.name, (package,)))
    return [
        module.at(imported.line, f"{imported.target} is not of the front door: take it from {API}")
        for imported in imports(module)
        if imported.root == "qemu_shim"
        and imported.target not in (API, *own, *BESIDE)
        and not within(imported.target, (*own, *BESIDE))
    ]


def doors(module: Module) -> list[ast.Attribute]:
    nodes = (node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute))
    return [node for node in nodes if node.attr in DOORS]


def check_doors(module: Module) -> list[str]:
    """`guest.machine`, `ctx.host` and `device.plugged` are used by those above, and by all of them."""
    if not within(module.name, LIBRARY):
        return []
    found = doors(module)
    if module.name in BEHIND:
        return [] if found else [module.at(1, "goes behind the front door no more: take it off the list")]
    return [
        module.at(node, f".{node.attr} leads behind the front door, to what may change") for node in found
    ]


CHECKERS = (check_imports, check_doors)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_library_is_written_with_the_front_door(checker: Checker) -> None:
    hold(checker, product())


def test_whoever_is_listed_is_there() -> None:
    assert BEHIND.keys() <= {module.name for module in product()}
    taken = {
        imported.target
        for module in product()
        if within(module.name, LIBRARY)
        for imported in imports(module)
    }
    assert all(any(target.startswith(beside) for target in taken) for beside in BESIDE)


@pytest.mark.parametrize(
    ("checker", "path", "text"),
    [
        (check_imports, "qemu_shim/study/workloads/x.py", "from qemu_shim.vmm.machine import Machine"),
        (check_imports, "qemu_shim/study/workloads/x.py", "from qemu_shim.scenarios.series import mmio"),
        (check_imports, "qemu_shim/scenarios/series/x.py", "from qemu_shim.scenarios.context import Context"),
        (check_imports, "qemu_shim/scenarios/series/x.py", "def late():\n    import qemu_shim.vmm.designs"),
        (
            check_doors,
            "qemu_shim/scenarios/series/x.py",
            "async def play(ctx):\n    await ctx.host.kill('kvmd')",
        ),
        (check_doors, "qemu_shim/study/workloads/x.py", "def f(guest):\n    return guest.machine.slots"),
        (check_doors, "qemu_shim/scenarios/series/msi.py", "async def play(ctx): ..."),
    ],
)
def test_what_is_not_of_the_front_door_is_seen(checker: Checker, path: str, text: str) -> None:
    assert len(checker(snippet(path, text))) == 1


def test_the_front_door_is_let_pass() -> None:
    text = "from qemu_shim.api import Context\nfrom protocol.hw.dsa import Status\nimport trio"
    assert [*check_imports(snippet("qemu_shim/scenarios/series/x.py", text))] == []
    assert check_imports(snippet("qemu_shim/cli.py", "import qemu_shim.vmm.machine")) == []
