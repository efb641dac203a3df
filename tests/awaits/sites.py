"""The awaits of the cores across which something that was known is used again, and what is said beside each.

A sleep carries a name that was bound before it and is read after it (`graph`), unless it cannot go stale
(`values`).  A loop around a sleep carries what it iterates over: `each NAME`.  A question that ended the
function one way is carried too, as `asked`: `if closed: raise`, a sleep, then what only an open one may do.

Beside such an await, above its statement, stands one comment, of clauses joined by ` | `:

    # await: NAMES: WHAT MAY BE LOST; asked again: WHERE (tests/FILE.py::TEST)
    # await: NAMES: cannot change: WHY

What holds at every await of a function stands above its `def` as `# awaits: ...`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.awaits.graph import Graph, Node, awaits_in, parameters
from tests.awaits.values import Values
from tests.tidy.source import Module, modules, product

CORES = ("kvmd", "iommufdd", "device_sim", "vfio_user")
ASKED = "asked"
NAME = r"(?:each )?[A-Za-z_]\w*"
CLAUSE = re.compile(
    rf"(?P<names>{NAME}(?:, {NAME})*): "
    r"(?:cannot change: (?P<why>.+)|(?P<loss>.+?); asked again: (?P<where>.+) \((?P<tests>tests/[^()]+)\))"
)
FORM = "NAMES: LOSS; asked again: WHERE (TEST), or NAMES: cannot change: WHY"


@dataclass(frozen=True, slots=True)
class Clause:
    """What is said of some names; without `tests` they cannot change."""

    names: tuple[str, ...]
    what: str
    where: str = ""
    tests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """One sleep; `carried` is what was known before it and is used after it."""

    module: Module
    function: str
    line: int
    source: str
    carried: frozenset[str]
    said: tuple[tuple[int, Clause], ...]  # and in which line
    misread: tuple[tuple[int, str], ...]

    @property
    def clauses(self) -> tuple[Clause, ...]:
        return tuple(clause for _, clause in self.said)

    @property
    def complaints(self) -> list[str]:
        found = [f"not of the form {FORM}: {text!r}" for _, text in self.misread]
        said = {name for clause in self.clauses for name in clause.names}
        if missing := self.carried - said:
            found.append(f"sleeps, and nothing is said of: {', '.join(sorted(missing))}")
        for clause in self.clauses:
            found += [f"{test}: there is no such test" for test in clause.tests if not exists(test)]
        return [self.module.at(self.line, f"{self.function}: {complaint}") for complaint in found]


def cores() -> tuple[Module, ...]:
    return tuple(
        module for module in product() if module.path.parts[0] in CORES and module.path.parts[1] == "core"
    )


def sites(over: Iterable[Module], values: Values) -> Iterator[Site]:
    """Every sleep of `over` that carries something or is spoken of."""
    for module in over:
        for function in ast.walk(module.tree):
            if isinstance(function, ast.AsyncFunctionDef):
                yield from _sites_of(module, function, values)


def idle_comments(module: Module, found: Iterable[Site]) -> list[str]:
    """Comments of the kind that stand beside no sleep, or name what is not carried there."""
    complaints, spoken = [], set[int]()
    said: dict[tuple[int, str], bool] = {}  # (line of the comment, name) -> is it carried anywhere
    for site in found:
        spoken |= {line for line, _ in (*site.said, *site.misread)}
        for line, clause in site.said:
            for name in clause.names:
                said[line, name] = said.get((line, name), False) or name in site.carried
    complaints += [
        module.at(line, f"{name} is not carried across the await")
        for (line, name), used in said.items()
        if not used
    ]
    for number, text in enumerate(module.text.splitlines(), 1):
        if re.match(r"\s*# awaits?:", text) and number not in spoken:
            complaints.append(module.at(number, "no await under this comment"))
    return complaints


def exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return any(
        str(module.path) == path
        and any(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
            for node in ast.walk(module.tree)
        )
        for module in modules()
    )


# -- one function --------------------------------------------------------------------------------------


def _sites_of(module: Module, function: ast.AsyncFunctionDef, values: Values) -> Iterator[Site]:
    settled = values.settled_names(function, parameters(function))
    loops = {
        f"<iterator {node.lineno}>": None
        if values.is_settled(node.iter, settled)
        else f"each {first_name(node.target)}"
        for node in ast.walk(function)
        if isinstance(node, ast.For | ast.AsyncFor)
    }
    everywhere = list(comments_above(module, first_line(function)))
    questioned = set(_questioned(function, values, settled))
    for node, names in Graph(function).sleeps():
        assert node.asleep is not None
        carried = {loops.get(name, name) for name in names - settled} - {None}
        if node.line in questioned:
            carried.add(ASKED)
        beside = list(comments_above(module, node.line))
        if not carried and not beside:
            continue
        said, misread = _read([*everywhere, *beside])
        yield Site(
            module,
            function.name,
            node.line,
            _source(node, module),
            frozenset(name for name in carried if name is not None),
            tuple(said),
            tuple(misread),
        )


def _source(node: Node, module: Module) -> str:
    asleep = node.asleep
    if isinstance(asleep, ast.Await):
        return ast.unparse(asleep)
    return module.text.splitlines()[node.line - 1].strip().rstrip(":")


def _questioned(function: ast.AsyncFunctionDef, values: Values, settled: set[str]) -> Iterator[int]:
    """Lines that sleep between a question that ends the function one way, and what was asked for."""
    for node in ast.walk(function):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(body, list):
                continue
            asked = False
            for at in body:
                if asked and (at is not body[-1] or isinstance(at, ast.AsyncWith)):
                    yield from _sleeping_lines(at)
                asked |= (
                    isinstance(at, ast.If)
                    and isinstance(at.body[-1], ast.Return | ast.Raise)
                    and not values.is_settled(at.test, settled)
                )


def _sleeping_lines(at: ast.stmt) -> Iterator[int]:
    for node in ast.walk(at):
        if isinstance(node, ast.AsyncWith | ast.AsyncFor) or (
            isinstance(node, ast.stmt) and any(awaits_in(head_of(node)))
        ):
            yield node.lineno


def head_of(node: ast.stmt) -> ast.AST:
    """What a compound statement evaluates first; any other is that itself."""
    if isinstance(getattr(node, "body", None), list):
        return getattr(node, "test", None) or getattr(node, "iter", None) or ast.Pass()
    return node


def first_name(target: ast.expr) -> str:
    return next((node.id for node in ast.walk(target) if isinstance(node, ast.Name)), "_")


def first_line(function: ast.AsyncFunctionDef) -> int:
    return min([function.lineno, *(made.lineno for made in function.decorator_list)])


# -- the comments --------------------------------------------------------------------------------------


def comments_above(module: Module, line: int) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment of the kind that ends just above `line`; it may take several lines."""
    lines = module.text.splitlines()
    block: list[str] = []
    at = line - 1
    while at > 0 and lines[at - 1].strip().startswith("#"):
        text = lines[at - 1].strip().removeprefix("#").strip()
        block.insert(0, text)
        if match := re.match(r"awaits?: ", text):
            yield at, " ".join(block).removeprefix(match[0])
            block = []
        at -= 1


def _read(
    comments: Iterable[tuple[int, str]],
) -> tuple[list[tuple[int, Clause]], list[tuple[int, str]]]:
    said, misread = [], []
    for line, text in comments:
        for part in text.split(" | "):
            match = CLAUSE.fullmatch(part)
            if match is None:
                misread.append((line, part))
            else:
                tests = tuple(match["tests"].split(", ")) if match["tests"] else ()
                names = tuple(match["names"].split(", "))
                said.append((line, Clause(names, match["why"] or match["loss"], match["where"] or "", tests)))
    return said, misread
