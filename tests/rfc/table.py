"""The ids of `behaviours.toml`, the tests that carry them, and the table of both.

Which test carries which id is read from the source, so that the document and its tidy test need no run: a
marker stands on a test function, or on a `pytest.param` of its own decorators or of a table they name.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import wrap

from tests.tidy.source import ROOT, Module, modules

MARKERS = {"rfc": "RFC", "defect": "B"}  # marker -> how its ids begin
BEHAVIOURS, DEFECTS = 109, 40
DOCUMENT = ROOT / "docs" / "rfc.md"
WIDTHS = (6, 56, 60)  # of id, behaviour and test in a terminal
MISSING, PASSED = "MISSING", "passed"

Tests = Mapping[str, list[str]]  # id -> path::function
Results = Mapping[tuple[str, str], str]  # (id, path::function) -> passed, skipped or failed


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    behaviour: str
    expected: str
    source: str

    @property
    def is_defect(self) -> bool:
        return self.id.startswith("B-")


@cache
def rows() -> dict[str, Row]:
    read = tomllib.loads(Path(__file__).with_name("behaviours.toml").read_text(encoding="utf-8"))
    return {name: Row(name, **cells) for name, cells in read.items()}


def complaint(marker: str, ids: Iterable[object]) -> str | None:
    """What is wrong with the ids that one test gives one marker."""
    given = list(ids)
    for name in given:
        if not isinstance(name, str) or name not in rows() or not name.startswith(MARKERS[marker] + "-"):
            return f"{marker}({name!r}): no such id in tests/rfc/behaviours.toml"
        if given.count(name) > 1:
            return f"{marker}({name!r}) is given twice"
    return None if given else f"{marker}() names no id"


# -- which test carries which id -----------------------------------------------------------------------


def marks_in(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.Call]]:
    """`pytest.mark.rfc(...)` and `pytest.mark.defect(...)`, anywhere below `nodes`."""
    for node in nodes:
        for found in ast.walk(node):
            if isinstance(found, ast.Call) and isinstance(found.func, ast.Attribute):
                owner = found.func.value
                if found.func.attr in MARKERS and isinstance(owner, ast.Attribute) and owner.attr == "mark":
                    yield found.func.attr, found


def ids_of(module: Module) -> Iterator[tuple[str, str]]:
    """(id, path::function) of every mark of a test file."""
    constants = {
        target.id: node.value
        for node in module.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in module.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        looked: list[ast.AST] = list(node.decorator_list)
        named = {n.id for mark in looked for n in ast.walk(mark) if isinstance(n, ast.Name)}
        looked += [constants[name] for name in named & constants.keys()]
        test = f"{module.path}::{node.name}"
        found = [arg for _, call in marks_in(looked) for arg in call.args if isinstance(arg, ast.Constant)]
        yield from dict.fromkeys((str(arg.value), test) for arg in found)


def carriers() -> dict[str, list[str]]:
    """From the source of every test file."""
    found: dict[str, list[str]] = {}
    for module in modules():
        if module.path.parts[0] == "tests":
            for name, test in ids_of(module):
                found.setdefault(name, []).append(test)
    return found


def missing(tests: Tests) -> list[str]:
    return [name for name in rows() if not tests.get(name)]


# -- the table -----------------------------------------------------------------------------------------


def verdict(name: str, tests: Tests, results: Results) -> str:
    """Of one id: its worst result; a marked test that did not run has failed."""
    got = {results.get((name, test), "failed") for test in tests.get(name, ())}
    return next((word for word in ("failed", "skipped", PASSED) if word in got), MISSING)


def text_table(tests: Tests, results: Results) -> str:
    """For a terminal; the last line counts."""
    lines, count = [], {False: 0, True: 0}
    for row in rows().values():
        result = verdict(row.id, tests, results)
        count[row.is_defect] += result == PASSED
        carried = [part for test in tests.get(row.id, ["-"]) for part in _two_lines(test)]
        behaviour = wrap(f"{row.behaviour}: {row.expected}", WIDTHS[1])
        for n in range(max(len(behaviour), len(carried))):
            cells = [
                row.id if n == 0 else "",
                *(column[n] if n < len(column) else "" for column in (behaviour, carried)),
            ]
            padded = (cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
            lines.append(" | ".join([*padded, result if n == 0 else ""]).rstrip(" |"))
    behaviours, defects = count[False], count[True]
    lines.append(f"{behaviours} of {BEHAVIOURS} behaviours, {defects} of {DEFECTS} defects")
    return "\n".join(lines)


def _two_lines(test: str) -> list[str]:
    path, _, name = test.partition("::")
    return [path, *wrap(name, WIDTHS[2] - 2, initial_indent="  ", subsequent_indent="  ")] if name else [test]


HEAD = """\
# What the series says, and which test shows it

`make rfc` runs exactly these tests and prints this table with their results. It is written by
`python -m tests.rfc --write` from `tests/rfc/behaviours.toml` and the markers of the tests; a tidy test
notices when it is out of date. Where the posted code does something else than the series means, the row
says what is meant and names the defect.
"""


def document(tests: Tests) -> str:
    """docs/rfc.md."""
    parts = [HEAD, "## Behaviours\n", _markdown(tests, False), "## Defects of the posted code\n"]
    parts += ["Each test fails if the defect is put back.\n", _markdown(tests, True)]
    return "\n".join(parts)


def _markdown(tests: Tests, defects: bool) -> str:
    lines = ["| id | " + ("defect | right" if defects else "behaviour | expected") + " | source | tests |"]
    lines.append("| --- " * 5 + "|")
    for row in rows().values():
        if row.is_defect is defects:
            carried = "<br>".join(f"`{test}`" for test in tests.get(row.id, ["none yet"]))
            lines.append(f"| {row.id} | {row.behaviour} | {row.expected} | {row.source} | {carried} |")
    return "\n".join(lines) + "\n"
