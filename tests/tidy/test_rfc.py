"""Every id of tests/rfc/behaviours.toml against the markers of the tests, and both against docs/rfc.md."""

from __future__ import annotations

import pytest

from tests.rfc.table import (
    BEHAVIOURS,
    DEFECTS,
    DOCUMENT,
    carriers,
    complaint,
    document,
    ids_of,
    marks_in,
    missing,
    rows,
    text_table,
)
from tests.tidy.source import Module, modules, snippet
from tests.tidy.test_shape import reference_tags

EVERY_ID_HAS_A_TEST = True

MARKED = """
ROWS = [pytest.param(1, marks=pytest.mark.rfc("RFC-02")), 2]

@pytest.mark.rfc("RFC-01", "RFC-03")
@pytest.mark.defect("B-01")
@pytest.mark.parametrize("row", ROWS)
def test_one(row): ...

async def test_other(): ...
"""


def marks_nobody_carries(module: Module) -> list[str]:
    """Marks that `ids_of` overlooks, as on a class or in a helper."""
    written = [str(getattr(arg, "value", "")) for _, call in marks_in([module.tree]) for arg in call.args]
    carried = {name for name, _ in ids_of(module)}
    return [f"{module.path}: {name}" for name in written if name not in carried]


def test_ids_are_numbered_without_gaps() -> None:
    expected = [f"RFC-{n:02}" for n in range(1, BEHAVIOURS + 1)] + [
        f"B-{n:02}" for n in range(1, DEFECTS + 1)
    ]
    assert list(rows()) == expected


def test_every_row_says_where_it_is_from() -> None:
    known = reference_tags()
    for row in rows().values():
        assert {part.split()[0] for part in row.source.split(", ") if not part[0].isdigit()} <= known, row.id


def test_every_mark_is_read() -> None:
    test_files = [module for module in modules() if module.path.parts[0] == "tests"]
    assert [found for module in test_files for found in marks_nobody_carries(module)] == []


def test_a_mark_on_a_function_or_in_a_table_it_names_is_read() -> None:
    module = snippet("tests/test_x.py", MARKED)
    assert sorted(ids_of(module)) == [
        (name, "tests/test_x.py::test_one") for name in ("B-01", "RFC-01", "RFC-02", "RFC-03")
    ]
    assert marks_nobody_carries(module) == []


def test_a_mark_nobody_carries_is_seen() -> None:
    module = snippet(
        "tests/test_x.py", 'class Tests:\n    @pytest.mark.rfc("RFC-01")\n    def test_x(self): ...'
    )
    assert marks_nobody_carries(module) == ["tests/test_x.py: RFC-01"]


@pytest.mark.parametrize(
    ("marker", "ids", "word"),
    [
        ("rfc", ["RFC-110"], "no such id"),
        ("rfc", ["24/42"], "no such id"),
        ("rfc", ["B-01"], "no such id"),
        ("defect", ["B-1"], "no such id"),
        ("defect", [13], "no such id"),
        ("defect", ["B-13", "B-13"], "twice"),
        ("rfc", [], "names no id"),
    ],
)
def test_a_mistyped_mark_is_seen(marker: str, ids: list[object], word: str) -> None:
    assert word in (complaint(marker, ids) or "")


def test_an_id_without_a_passed_test_is_not_counted() -> None:
    tests = {"RFC-01": ["a::b"], "RFC-02": ["a::b", "a::c"], "RFC-03": ["a::b"], "B-01": ["a::b"]}
    results = {("RFC-01", "a::b"): "passed", ("RFC-02", "a::b"): "passed", ("B-01", "a::b"): "passed"}
    results |= {("RFC-02", "a::c"): "skipped"}
    lines = text_table(tests, results).splitlines()
    ends = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(("RFC-0", "B-0"))}
    wanted = {
        "RFC-01": "passed",
        "RFC-02": "skipped",
        "RFC-03": "failed",
        "RFC-04": "MISSING",
        "B-01": "passed",
    }
    assert {name: ends[name] for name in wanted} == wanted
    assert lines[-1] == "1 of 109 behaviours, 1 of 40 defects"
    assert missing(tests) == [name for name in rows() if name not in tests]


def test_the_document_is_what_the_tests_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(carriers()), "run python -m tests.rfc --write"


def test_every_id_has_a_test() -> None:
    assert not EVERY_ID_HAS_A_TEST or missing(carriers()) == []
