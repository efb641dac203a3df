"""docs/glossary.md: one meaning a term, and each lives where the page says."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from tests.tidy.source import ROOT, product
from tests.tidy.test_shape import CITATION, reference_tags

PAGE = ROOT / "docs" / "glossary.md"
COLUMNS = 4
WORDS = ("flush", "invalidation", "descriptor")  # these had several meanings once


def rows(text: str) -> list[list[str]]:
    """The cells of each row of a table; a head and the line under it are none."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return [row for row in cells if row[0] != "Term" and not row[0].startswith("---")]


@cache
def names() -> frozenset[str]:
    """What the product defines at the top of a module."""
    return frozenset(name for module in product() for node in module.tree.body for name in defined(node))


def defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    for target in node.targets if isinstance(node, ast.Assign) else []:
        yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def is_there(home: str) -> bool:
    return (ROOT / home).exists() if "/" in home else home in names()


def complaints(text: str) -> list[str]:
    found, terms = [], Counter[str]()
    for row in rows(text):
        if len(row) != COLUMNS:
            found.append(f"{row[0]}: {len(row)} columns")
            continue
        terms.update(term.strip() for term in row[0].split(","))
        homes = re.findall(r"`([^`]+)`", row[2])
        found += [f"{row[0]}: lives nowhere"] if not homes else []
        found += [f"{row[0]}: there is no {home}" for home in homes if not is_there(home)]
        tags = (match[1] for match in CITATION.finditer(row[3]))
        found += [f"{row[0]}: no {tag} in docs/references.md" for tag in tags if tag not in reference_tags()]
    return [*found, *(f"{term} has {count} meanings" for term, count in terms.items() if count > 1)]


def test_every_term_lives_where_the_glossary_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {row[0] for row in rows(text)} >= set(WORDS)
    assert complaints(text) == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("| flush | it | `NoSuchClass` | - |", "there is no NoSuchClass"),
        ("| flush | it | `kvmd/nowhere.py` | - |", "there is no kvmd/nowhere.py"),
        ("| flush | it | in the code | - |", "lives nowhere"),
        ("| flush | it | `Gpa` |", "3 columns"),
        ("| flush, flush | it | `Gpa` | - |", "2 meanings"),
        ("| flush | it | `Gpa` | [Manual 3] |", "no Manual"),
        ("| flush | it | `Gpa` | - [VT-d 6.5] |", ""),
    ],
)
def test_a_wrong_row_is_seen(row: str, complaint: str) -> None:
    found = complaints(row)
    assert len(found) == bool(complaint)
    assert all(complaint in said for said in found)
