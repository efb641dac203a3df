"""docs/lifecycles.md, drawn from the tables of the product: `python -m tests.lifecycles --write`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from protocol.lifecycle import LifeCycle

DOCUMENT = Path("docs/lifecycles.md")
PACKAGES = ("protocol", "kvmd", "iommufdd", "device_sim", "qemu_shim")
HEAD = """# Life cycles

What state a thing can be in, and what takes it to another; what is not drawn cannot happen and is an error
where it is tried (`protocol/lifecycle.py`).  Made of the tables in the code by `python -m tests.lifecycles
--write`.
"""


def life_cycles() -> Iterator[tuple[Path, str, LifeCycle[Any, Any]]]:
    """(file, constant, life cycle) of each that a module of the product defines."""
    for path in sorted(path for package in PACKAGES for path in Path(package).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(node.value.func) == "LifeCycle":
                    name = ast.unparse(target)
                    yield path, name, getattr(import_module(".".join(path.with_suffix("").parts)), name)


def enums(cycle: LifeCycle[Any, Any]) -> tuple[type[Enum], type[Enum]]:
    """Its states and its events."""
    (state, event), *_ = cycle.transitions
    return type(state), type(event)


def document() -> str:
    return "\n".join([HEAD, *(part for found in life_cycles() for part in _drawn(*found))])


def _drawn(path: Path, name: str, cycle: LifeCycle[Any, Any]) -> Iterator[str]:
    left = {state for state, _ in cycle.transitions}
    yield f"## {cycle.name}\n\n`{name}` in `{path}`.\n\n```mermaid\nstateDiagram-v2"
    yield f"    [*] --> {cycle.born.name}"
    for (state, event), then in cycle.transitions.items():
        yield f"    {state.name} --> {then.name}: {_words(event)}"
    for state in enums(cycle)[0]:
        if state not in left:
            yield f"    {state.name} --> [*]"
    yield "```\n"


def _words(event: Enum) -> str:
    return event.name.lower().replace("_", " ")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document(), encoding="utf-8")
    sys.exit(DOCUMENT.read_text(encoding="utf-8") != document())
