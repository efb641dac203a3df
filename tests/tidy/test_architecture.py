"""ARCHITECTURE.md and the code against the tree: the files, invariants and tests they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tidy.source import ROOT, Module, hold, product, snippet

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = re.compile(r"\bI(\d+)\b")
NAMED_FILE = re.compile(r"`((?:protocol|kvmd|iommufdd|device_sim|qemu_shim|tests|docs|bench)/[\w/.-]*)`")


def rows() -> dict[int, list[str]]:
    """Number -> the cells of its row in the table of invariants."""
    found = {}
    for line in TEXT.splitlines():
        if match := re.match(r"\| I(\d+) \|", line):
            found[int(match[1])] = [cell.strip() for cell in line.strip("|").split("|")]
    return found


def unknown_numbers(source: str, known: set[int]) -> set[int]:
    return {int(number) for number in NUMBER.findall(source)} - known


def test_invariants_are_numbered_without_gaps() -> None:
    assert sorted(rows()) == list(range(1, len(rows()) + 1))


def test_every_invariant_has_a_home_a_checker_and_a_statement() -> None:
    for number, cells in rows().items():
        assert len(cells) == 4, f"I{number}: {cells}"
        assert all(cells), f"I{number}: {cells}"
        home = NAMED_FILE.search(cells[2])
        assert home, f"I{number} has no home: {cells[2]}"
        assert f"I{number}" in (ROOT / home[1]).read_text(), f"{home[1]} does not name I{number}"


def test_the_code_names_no_invariant_the_table_lacks() -> None:
    known = set(rows())
    for module in product():
        lacking = unknown_numbers(module.text, known)
        assert not lacking, f"{module.path}: I{sorted(lacking)}"


def test_the_check_of_numbers_can_fail() -> None:
    assert unknown_numbers("# I3 holds, I99 does not", {3}) == {99}


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
