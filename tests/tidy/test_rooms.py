"""The rooms of kvmd's core: each stands on those below it, as ARCHITECTURE draws them.

A room is a folder, or a file beside the folders.  What stands on one floor does not know of one another.  A
class of a room takes a few things by name: more of them belong together, or the class does not.
"""

from __future__ import annotations

import ast
import re
from pathlib import PurePosixPath

import pytest

from tests.tidy.source import ROOT, Module, hold, imports, modules, snippet

CORE = PurePosixPath("kvmd/core")
FLOORS = (
    ("lease", "users"),
    ("mm", "tables"),
    ("host", "slots"),
    ("faults",),
    ("cpu",),
    ("export",),
    ("vm",),
    ("vm_list", "capability", "invariants", "stats"),
    ("inspect",),
)
TAKES_MAX = 6
TAKES_MORE = {"HostKernel": "the machine: memory, clock and limits come from outside, each by itself"}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(name: str) -> str | None:
    """The room of a dotted name; None: it is no part of kvmd's core."""
    prefix = ".".join(CORE.parts) + "."
    return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else None


def check_rooms(module: Module) -> list[str]:
    own = room_of(module.name)
    if own is None:
        return []
    if own not in FLOOR_OF:
        return [module.at(1, f"{own} has no floor: give it one in {__name__}")]
    found = []
    for imported in imports(module):
        other = room_of(imported.target) or room_of(f"{imported.target}.{imported.item}")
        if other not in (None, own) and FLOOR_OF.get(str(other), len(FLOORS)) >= FLOOR_OF[own]:
            found.append(module.at(imported.line, f"{own} does not stand on {other}"))
    return found


def check_takes(module: Module) -> list[str]:
    """What a class that behaves takes to be made; records are as long as what they stand for."""
    if room_of(module.name) is None:
        return []
    found = []
    for owner in ast.walk(module.tree):
        if not isinstance(owner, ast.ClassDef) or owner.name in TAKES_MORE:
            continue
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                takes = len(node.args.args) + len(node.args.kwonlyargs) - 1
                if takes > TAKES_MAX:
                    found.append(module.at(node, f"{owner.name} takes {takes} things, at most {TAKES_MAX}"))
    return found


def picture(text: str) -> list[tuple[str, ...]]:
    """The floors as ARCHITECTURE draws them, from the ground up: names in the left column of the block that
    begins with `inspect`."""
    found = re.search(r"^```\n(inspect .*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, "ARCHITECTURE draws no rooms"
    rows = [re.split(r"  +", row)[0] for row in found[1].splitlines() if not row.startswith(" ")]
    return [tuple(name.strip("/,") for name in row.split()) for row in reversed(rows)]


def test_each_room_stands_on_those_below() -> None:
    hold(check_rooms, modules())


def test_each_class_takes_a_few_things() -> None:
    hold(check_takes, modules())


def test_a_class_that_takes_everything_is_seen() -> None:
    text = "class {}:\n    def __init__(self, a, b, c, d, *, e, f{}): ..."
    assert check_takes(snippet("kvmd/core/slots/a.py", text.format("A", ""))) == []
    assert len(check_takes(snippet("kvmd/core/slots/a.py", text.format("A", ", g")))) == 1
    assert check_takes(snippet("kvmd/core/slots/a.py", text.format("HostKernel", ", g"))) == []


def test_every_room_of_the_table_is_there() -> None:
    there = {room_of(module.name) for module in modules()}
    assert FLOOR_OF.keys() <= there


def test_architecture_draws_the_rooms_as_they_are() -> None:
    assert picture((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")) == list(FLOORS)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kvmd/core/cpu/cpu.py", "if TYPE_CHECKING:\n    from kvmd.core.vm import Kvm"),
        ("kvmd/core/faults/fault_path.py", "def late():\n    from kvmd.core.cpu.vcpu import Vcpu"),
        ("kvmd/core/slots/slots_change.py", "from kvmd.core.export import pinning"),
        ("kvmd/core/export/importer.py", "from kvmd.core.vm_list import VmList"),
        ("kvmd/core/mm/mm.py", "from kvmd.core.tables.flush import Flusher"),
        ("kvmd/core/tables/zap.py", "from ..slots.memslot import Memslot"),
        ("kvmd/core/host.py", "import kvmd.core.slots.memslot"),
        ("kvmd/core/users.py", "from kvmd.core import vm"),
        ("kvmd/core/attic.py", ""),
        ("kvmd/core/vm.py", "from kvmd.core.attic import Box"),
    ],
)
def test_an_import_that_climbs_is_seen(path: str, text: str) -> None:
    assert len(check_rooms(snippet(path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kvmd/core/cpu/vcpu.py", "from kvmd.core.cpu.cpu import Cpu\nfrom kvmd.core import lease"),
        ("kvmd/core/vm.py", "from kvmd.core.export.exports import Exports\nfrom protocol.units import Gfn"),
        ("kvmd/service/vm.py", "from kvmd.core.vm import Kvm"),
    ],
)
def test_an_import_that_goes_down_is_let_pass(path: str, text: str) -> None:
    assert check_rooms(snippet(path, text)) == []


def test_a_picture_of_another_house_is_seen() -> None:
    text = "```\ninspect           told\nvm, users/        of\n                  more\n```\n"
    assert picture(text) == [("vm", "users"), ("inspect",)]
