"""Bugs planted by a change of the source: a method without one of its lines, or with another one."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any


def rewritten(owner: type, name: str, old: str, new: str) -> Any:
    """`owner.name` with `old`, which occurs in it once, replaced by `new`."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {source.count(old)} times {old!r}"
    made: dict[str, Any] = {}
    header = "from __future__ import annotations\n"
    exec(compile(header + source.replace(old, new), f"<{name}, planted>", "exec"), function.__globals__, made)
    return made[name]
