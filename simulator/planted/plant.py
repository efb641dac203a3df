"""A planted bug: lines of the product as they would be wrong, put into its functions and taken out again.

An edit names a function and a piece of its source.  The function is compiled anew with the piece replaced, in
its own globals, and gets the other's code object: so it is the same function for everybody, who holds a bound
method of it included.  An edit whose piece is not there (once) is refused: the product has changed, and the
mistake must be said in its words of today.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple

_FLAGS = annotations.compiler_flag  # as every module of the product has it


class DoesNotApply(Exception):
    """An edit names what is not there, or what is there more than once."""


class Edit(NamedTuple):
    """In the function `where`, as in "kvmd.core.tables.flush:Flusher.drain", `old` becomes `new`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Plant:
    """`what` is the mistake in one sentence; `invariant` the one it belongs to (docs/invariants.md); `races`
    the races and defects of the series that it is (R7, B-21); `simulated`: may a story of the simulator come
    to it?"""

    id: str
    what: str
    invariant: str
    edits: Sequence[Edit]
    races: Sequence[str] = ()
    simulated: bool = True

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Raises DoesNotApply, and then nothing has changed."""
        sources: dict[FunctionType, str] = {}
        for edit in self.edits:
            function = function_at(edit.where)
            source = sources.get(function) or source_of(function)
            if source.count(edit.old) != 1:
                count = source.count(edit.old)
                raise DoesNotApply(f"{self.id}: {edit.where} has {count} times {edit.old!r}, not once")
            sources[function] = source.replace(edit.old, edit.new)
        codes = {function: compiled(self.id, function, source) for function, source in sources.items()}
        kept = {function: function.__code__ for function in codes}
        try:
            for function, code in codes.items():
                function.__code__ = code
            yield
        finally:
            for function, code in kept.items():
                function.__code__ = code


def source_of(function: FunctionType) -> str:
    lines = textwrap.dedent(inspect.getsource(function)).splitlines(keepends=True)
    while not lines[0].startswith(("def ", "async def ")):  # decorators stay as they are
        del lines[0]
    return "".join(lines)


def compiled(name: str, function: FunctionType, source: str) -> CodeType:
    """In a function around it that has what it closes over (`super()` does), or the code would not fit."""
    free = function.__code__.co_freevars
    around = (
        f"def around({', '.join(free)}):\n{textwrap.indent(source, '    ')}\n    return {function.__name__}"
    )
    made: dict[str, Any] = {}
    try:
        code = compile(around, f"<{name}>", "exec", _FLAGS, dont_inherit=True)
    except SyntaxError as error:
        raise DoesNotApply(f"{name}: {function.__qualname__} would be no Python: {error}") from error
    exec(code, function.__globals__, made)
    planted: CodeType = made["around"](*free).__code__
    if planted.co_freevars != free:
        raise DoesNotApply(f"{name}: {function.__qualname__} closes over {free}, not {planted.co_freevars}")
    was = function.__code__  # tracebacks, and who asks for the source, go on finding it
    return planted.replace(co_filename=was.co_filename, co_firstlineno=was.co_firstlineno)


def function_at(where: str) -> FunctionType:
    """The plain function behind a name: of a method, a property, whatever decorates it.  DoesNotApply."""
    module, _, path = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = inspect.getattr_static(found, part)
    except (ImportError, AttributeError) as error:
        raise DoesNotApply(f"{where} is not there: {error}") from error
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    found = inspect.unwrap(found)
    if not isinstance(found, FunctionType):
        raise DoesNotApply(f"{where} is no function but {type(found).__name__}")
    return found
