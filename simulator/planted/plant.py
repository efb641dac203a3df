"""A planted bug: lines of the product as they would be wrong, put into its functions and taken out again.

An edit names a function and a piece of its source.  The function is compiled anew with the piece replaced, in
its own globals, and gets the other's code object: so it is the same function for everybody, who holds a bound
method of it included.  An edit whose piece is not there (once) is refused: the product has changed, and the
mistake must be said in its words of today.

The statement that an edit is in is told of before it is run (met.py): a run that never comes to one is a run
of the product as it is.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from simulator.planted.met import number_of

_FLAGS = annotations.compiler_flag  # as every module of the product has it
_TOLD = "from simulator.planted.met import meet as _meet\n_meet({})"


class DoesNotApply(Exception):
    """An edit names what is not there, or what is there more than once."""


class Edit(NamedTuple):
    """In the function `where`, as in "kvmd.core.tables.flush:Flusher.drain", `old` becomes `new`."""

    where: str
    old: str
    new: str


class Edited(NamedTuple):
    """A function's source; of which plant an edit begins in a line of it, from 1 on."""

    source: str
    told: tuple[tuple[int, str], ...] = ()

    def replaced(self, plant: str, old: str, new: str) -> Edited:
        before, _, behind = self.source.partition(old)
        line, moved = 1 + before.count("\n"), new.count("\n") - old.count("\n")
        others = ((at + moved if at > line else at, other) for at, other in self.told)
        return Edited(before + new + behind, (*others, (line, plant)))


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
        edited: dict[FunctionType, Edited] = {}
        for edit in self.edits:
            function = function_at(edit.where)
            was = edited.get(function) or Edited(source_of(function))
            if was.source.count(edit.old) != 1:
                count = was.source.count(edit.old)
                raise DoesNotApply(f"{self.id}: {edit.where} has {count} times {edit.old!r}, not once")
            edited[function] = was.replaced(self.id, edit.old, edit.new)
        with _put_in(self.id, edited):
            yield


@contextmanager
def telling(plants: Iterable[Plant]) -> Iterator[None]:
    """None is in; the lines that they would change tell of it when they are come to."""
    edited: dict[FunctionType, Edited] = {}
    for plant in plants:
        for edit in plant.edits:
            function = function_at(edit.where)
            was = edited.get(function) or Edited(source_of(function))
            if edit.old in was.source:  # else another edit of the plant puts it there
                edited[function] = was.replaced(plant.id, edit.old, edit.old)
    with _put_in("telling", edited):
        yield


@contextmanager
def _put_in(name: str, edited: Mapping[FunctionType, Edited]) -> Iterator[None]:
    codes = {function: compiled(name, function, wrong) for function, wrong in edited.items()}
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


def compiled(name: str, function: FunctionType, edited: Edited) -> CodeType:
    """In a function around it that has what it closes over (`super()` does), or the code would not fit."""
    free = function.__code__.co_freevars
    around = (
        f"def around({', '.join(free)}):\n{textwrap.indent(edited.source, '    ')}\n"
        f"    return {function.__name__}"
    )
    made: dict[str, Any] = {}
    try:
        tree = ast.parse(around)
        for line, plant in edited.told:
            _tell(tree, 1 + line, number_of(plant))
        code = compile(tree, f"<{name}>", "exec", _FLAGS, dont_inherit=True)
    except SyntaxError as error:
        raise DoesNotApply(f"{name}: {function.__qualname__} would be no Python: {error}") from error
    exec(code, function.__globals__, made)
    planted: CodeType = made["around"](*free).__code__
    if planted.co_freevars != free:
        raise DoesNotApply(f"{name}: {function.__qualname__} closes over {free}, not {planted.co_freevars}")
    was = function.__code__  # tracebacks, and who asks for the source, go on finding it
    return planted.replace(co_filename=was.co_filename, co_firstlineno=was.co_firstlineno)


def _tell(tree: ast.Module, line: int, number: int) -> None:
    """Before the innermost statement of the planted function that has this line, or else first of all."""
    (around,) = tree.body
    assert isinstance(around, ast.FunctionDef)
    planted = around.body[0]
    assert isinstance(planted, ast.FunctionDef | ast.AsyncFunctionDef)
    body, place = planted.body, 0
    for node in ast.walk(planted):  # who is inside another one comes later
        blocks: list[Any] = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
        for block in (it for it in blocks if isinstance(it, list)):  # a lambda's body is none
            for at, statement in enumerate(block):
                if statement.lineno <= line <= statement.end_lineno:
                    body, place = block, at
    told = ast.parse(_TOLD.format(number)).body
    for node in (within for statement in told for within in ast.walk(statement)):
        ast.copy_location(node, body[place])
    body[place:place] = told


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
