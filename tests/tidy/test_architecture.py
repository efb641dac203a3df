"""The documents and the code against the tree: the files, invariants and tests they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulator.planted.registry import PLANTED
from tests.tidy.source import ROOT, Module, hold, product, snippet

DOCS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
INVARIANTS = (ROOT / "docs" / "invariants.md").read_text()
NUMBER = re.compile(r"\b([IR]\d+)\b")
NAMED_FILE = re.compile(
    r"`((?:protocol|kvmd|iommufdd|device_sim|qemu_shim|simulator|tests|docs|bench)/[\w/.-]*)`"
)


def rows(kind: str, text: str = INVARIANTS) -> dict[str, list[str]]:
    """Number -> the cells of its row in a table of invariants; `kind`: I, or R for those of a race."""
    found = {}
    for line in text.splitlines():
        if match := re.match(rf"\| ({kind}\d+) \|", line):
            found[match[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    return found


def unknown_numbers(source: str, known: set[str]) -> set[str]:
    return set(NUMBER.findall(source)) - known


def wrong_row(number: str, cells: list[str], known: set[str]) -> str | None:
    """What a row lacks: its own home that names it, or the invariant of which it is a case."""
    if len(cells) != 4 or not all(cells):
        return f"{number}: {cells}"
    if cells[2].startswith("as "):
        named = set(NUMBER.findall(cells[2] + cells[3]))
        return None if named and named <= known else f"{number} is a case of {named or 'nothing'}"
    home = NAMED_FILE.search(cells[2])
    if not home:
        return f"{number} has no home: {cells[2]}"
    return None if number in NUMBER.findall((ROOT / home[1]).read_text()) else f"{home[1]} names no {number}"


@pytest.mark.parametrize(("kind", "count"), [("I", len(rows("I"))), ("R", 28)])
def test_invariants_are_numbered_without_gaps(kind: str, count: int) -> None:
    assert list(rows(kind)) == [f"{kind}{n}" for n in range(1, count + 1)]


def test_every_invariant_has_a_home_a_checker_and_a_statement() -> None:
    known = set(rows("I"))
    found = [wrong_row(*row, known) for kind in "IR" for row in rows(kind).items()]
    assert [wrong for wrong in found if wrong] == []


@pytest.mark.parametrize(
    "cells",
    [
        ["I1", "holds", "`kvmd/core/mm/page.py`", ""],
        ["I1", "holds", "", "`check_vm`"],
        ["I1", "holds", "somewhere", "`check_vm`"],
        ["I1", "holds", "`kvmd/core/mm/page.py`", "`check_vm`"],  # which names I21, and not I1
        ["R1", "holds", "as I99", "as I99"],
        ["R1", "holds", "as before", "`check_vm`"],
    ],
)
def test_a_row_that_lacks_something_is_seen(cells: list[str]) -> None:
    assert wrong_row(cells[0], cells, {"I1"})


def test_for_every_race_a_bug_is_planted() -> None:
    planted = {race for plant in PLANTED.values() for race in (*plant.races, plant.invariant)}
    assert set(rows("R")) - planted == set()


def test_the_code_names_no_invariant_the_table_lacks() -> None:
    known = {*rows("I"), *rows("R")}
    for module in product():
        lacking = unknown_numbers(module.text, known)
        assert not lacking, f"{module.path}: {sorted(lacking)}"


def test_the_check_of_numbers_can_fail() -> None:
    assert unknown_numbers("# I3 and R3 hold, I99 and R29 do not", {"I3", "R3"}) == {"I99", "R29"}


def test_every_file_a_document_names_exists() -> None:
    for document in DOCS:
        for name in NAMED_FILE.findall(document.read_text()):
            planned = "0001" in document.name  # tells what was not built, too
            assert planned or Path(ROOT / name).exists(), f"{document.name} names {name}"


TEST = re.compile(r"((?:tests/[\w/]*)?\w*(?:\.py)?)::(test_\w+)")


def missing_tests(module: Module) -> list[str]:
    """Tests that a module names as the proof of what it says, and that are not there.  `::test_x` and
    `test_y.py::test_x` are of the file, or beside the file, that was named last."""
    found, last = [], ROOT / "tests" / "none.py"
    for match in TEST.finditer(module.text):
        path, name = match[1], match[2]
        last = ROOT / path if "/" in path else last.with_name(path) if path else last
        if not last.exists() or f"def {name}(" not in last.read_text(encoding="utf-8"):
            found.append(module.at(module.text.count("\n", 0, match.start()) + 1, f"no test {match[0]}"))
    return found


def test_every_test_the_code_names_exists() -> None:
    hold(missing_tests, product())


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("(tests/tidy/test_architecture.py::test_every_file_a_document_names_exists)", 0),
        ("(tests/tidy/test_width.py::test_prose_fits), (test_architecture.py::test_a_wrong_name_is_seen)", 0),
        ("(tests/tidy/test_width.py::test_prose_fits), (::test_a_wide_line_is_seen)", 0),
        ("(tests/tidy/test_width.py::test_no_such)", 1),
        ("(tests/tidy/test_nowhere.py::test_prose_fits)", 1),
        ("(::test_prose_fits)", 1),
    ],
)
def test_a_wrong_name_is_seen(said: str, count: int) -> None:
    assert len(missing_tests(snippet("kvmd/core/vm.py", f'"""Safe, see {said}."""'))) == count
