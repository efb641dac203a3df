"""The front door's names: as signatures, which a committed file holds, and as docs/api.md of docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from qemu_shim import api
from tests.tidy.source import ROOT

SIGNATURES = ROOT / "tests" / "api" / "signatures.txt"
DOCUMENT = ROOT / "docs" / "api.md"
HEAD = """# The API

Generated from docstrings (`python -m tests.api --write`); a tidy test holds it to the code, and
`tests/api/signatures.txt` holds the names and signatures. [tutorial.md](tutorial.md) begins at the beginning.
"""


def signatures() -> str:
    """A line a name; a line a public member of each class."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for name in api.__all__:
        yield f"{name}{_shown(getattr(api, name))}"
        yield from (f"{name}.{member}{_shown(it)}" for member, it in members(getattr(api, name)))


def members(of: Any) -> list[tuple[str, Any]]:
    """Of a class: what it and its bases in this project have in public, in the order of the source."""
    if not inspect.isclass(of) or issubclass(of, BaseException):
        return []
    found: dict[str, Any] = {}
    for base in reversed(of.__mro__):
        if base.__module__.split(".")[0] in ("qemu_shim", "protocol"):
            annotated = inspect.get_annotations(base).items()
            found |= {name: f": {getattr(it, '__forward_arg__', it)}" for name, it in annotated}
            found |= {name: it for name, it in vars(base).items() if _is_member(it)}
    return [(name, it) for name, it in found.items() if not name.startswith("_")]


def _is_member(it: Any) -> bool:
    return inspect.isfunction(it) or isinstance(it, (property, classmethod))


def _shown(it: Any) -> str:
    """A function's signature, a class's fields, a value's type."""
    if isinstance(it, str):
        return it
    if isinstance(it, property):
        assert it.fget is not None
        return f": {inspect.signature(it.fget).return_annotation}"
    if isinstance(it, classmethod):
        it = it.__func__
    if inspect.isclass(it):
        return ""
    if callable(it):
        text = re.sub(r"^\((?:self|cls)(?:, )?", "(", _signature(it))
        return f"{text} (awaited)" if inspect.iscoroutinefunction(it) else text
    return f": {type(it).__name__}"


class _Bare(str):
    """An annotation as it was written."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature(of: Any) -> str:
    it = inspect.signature(of)
    parameters = [each.replace(annotation=_Bare(each.annotation)) for each in it.parameters.values()]
    if {"self", "cls"} & it.parameters.keys():
        parameters[0] = parameters[0].replace(annotation=inspect.Parameter.empty)
    return str(it.replace(parameters=parameters, return_annotation=_Bare(it.return_annotation)))


def document() -> str:
    return "\n".join([HEAD, _quoted(api.__doc__), "", *_chapters()])


def _quoted(text: str | None) -> str:
    return inspect.cleandoc(text or "")


def _chapters() -> Iterator[str]:
    for name in api.__all__:
        it = getattr(api, name)
        yield f"## {name}\n"
        if inspect.isfunction(it):
            yield f"`{name}{_shown(it)}`\n"
        if inspect.isclass(it) or inspect.isfunction(it):
            yield f"{_quoted(it.__doc__)}\n"
            yield from _members(it)
        else:
            yield f"{_value(it)}\n"


def _value(it: Any) -> str:
    return f"`{it:#x}`" if isinstance(it, int) else f"By name: {', '.join(f'`{name}`' for name in it)}."


def _members(of: Any) -> Iterator[str]:
    counters = {each.name: each.metadata for each in dataclasses.fields(of)} if of is api.Counters else {}
    if counters:
        yield "| Counter | Unit | What |"
        yield "| --- | --- | --- |"
        yield from (f"| `{name}` | {of['unit']} | {of['meaning']} |" for name, of in counters.items())
        yield ""
        return
    listed = [line for name, it in members(of) for line in _member(name, it)]
    if listed:
        yield "\n".join(listed) + "\n"


def _member(name: str, it: Any) -> Iterator[str]:
    yield f"- `{name}{_shown(it)}`"
    about = it.__func__ if isinstance(it, classmethod) else it
    if not isinstance(it, str) and about.__doc__:
        yield from (f"  {line}".rstrip() for line in inspect.cleandoc(about.__doc__).splitlines())
