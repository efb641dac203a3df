"""docs/invalidation.md against the suite of sources: a line for each row, and no line without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOCUMENT = Path("docs/invalidation.md")
SUITE = Path("tests/unit/kvmd/test_invalidation_sources.py")
ROW = re.compile(r"^\|.*\| `([^`]+)` \|$", re.MULTILINE)
WHOLE, NOBODY = "whole", "nobody"


def rows(text: str) -> list[tuple[str, str]]:
    """(test, what is told) of each line."""
    return [(match[1], match[0].split("|")[3].strip()) for match in ROW.finditer(text)]


def sources(text: str) -> dict[str, str]:
    """Each source of the suite and what it tells, as the suite writes it."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SOURCES":
            table = node.value
            assert isinstance(table, ast.Dict)
            pairs = zip(table.keys, table.values, strict=True)
            return {ast.literal_eval(k): _told(v) for k, v in pairs if k is not None}
    raise AssertionError("the suite has no table SOURCES")


def _told(call: ast.expr) -> str:
    assert isinstance(call, ast.Call)
    return ast.unparse(call.args[1]).strip("[]").lower() or NOBODY


def complaints(document: str, suite: str) -> list[str]:
    written, tested = rows(document), sources(suite)
    found = [f"`{name}` is no row of the suite" for name, _ in written if name not in tested]
    found += [f"`{name}` has no line" for name in tested if name not in {row for row, _ in written}]
    found += [f"`{name}` has two lines" for name in tested if [n for n, _ in written].count(name) > 1]
    return found + [
        f"`{name}`: importers are told {tested[name]}, the document says {told}"
        for name, told in written
        if name in tested and not told.startswith(tested[name])
    ]


def test_every_source_has_its_line_and_every_line_its_test() -> None:
    assert complaints(DOCUMENT.read_text(), SUITE.read_text()) == []


def test_a_wrong_line_is_noticed() -> None:
    suite = "SOURCES: dict[str, Source] = {'munmap': Source(act, [WHOLE]), 'get': Source(act, [])}"
    assert complaints("| a | b | whole | `munmap` |\n| a | b | nobody | `get` |\n", suite) == []
    assert complaints("| a | b | page | `munmap` |\n| a | b | nobody | `old` |\n", suite) == [
        "`old` is no row of the suite",
        "`get` has no line",
        "`munmap`: importers are told whole, the document says page",
    ]
