"""Prose is wrapped at 110 columns, as code is: it is read in a terminal, and as a difference.

Tables, code blocks, a line that is one long word (a link, a path) and generated pages are let pass.
"""

from __future__ import annotations

import pytest

from tests.tidy.source import ROOT

COLUMNS = 110
FENCE = "```"
# Written by a program, a sentence or a row a line.
GENERATED = {f"docs/{page}.md" for page in ("api", "awaits", "lifecycles", "results/comparison", "rfc")}


def too_wide(text: str) -> list[int]:
    """The numbers of the lines of prose that are wider than COLUMNS."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith(FENCE):
            fenced = not fenced
        code = fenced or line.startswith("    ")
        if len(line) > COLUMNS and not (code or line.startswith("|") or is_one_word(line)):
            found.append(number)
    return found


def is_one_word(line: str) -> bool:
    """Nothing in it could be wrapped, but for what begins a list item."""
    return len(line.removeprefix("- ").split()) == 1


def pages() -> dict[str, str]:
    found = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_prose_fits() -> None:
    texts = pages()
    assert texts.keys() >= GENERATED
    kept = texts.keys() - GENERATED
    wide = [f"{path}:{n}" for path in sorted(kept) for n in too_wide(texts[path])]
    assert not wide, f"wrap at {COLUMNS} columns: " + ", ".join(wide)


WIDE = "word " * 30


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (WIDE, [1]),
        (f"- {WIDE}", [1]),
        (f"short\n\n  {WIDE}", [3]),
        (f"{FENCE}\nx\n{FENCE}\n{WIDE}", [4]),
        ("word " * 21, []),
        (f"| {WIDE} |", []),
        (f"    {WIDE}", []),
        (f"{FENCE}\n{WIDE}\n{FENCE}", []),
        ("- https://" + "x" * COLUMNS, []),
    ],
)
def test_a_wide_line_is_seen(text: str, lines: list[int]) -> None:
    assert too_wide(text) == lines
