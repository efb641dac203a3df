"""docs/tutorial.md and docs/howto.md as something to do: files, commands, and what these must say.

Of Python's own library alone: a fresh clone reads it before it has an environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = re.compile(r"^`(\w+\.py)`.*?\n\n```python\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"^    (\S.*)$", re.M)
COMMANDS = ("make ", ".venv/bin/")
FAILED = ("FAILED: ",)  # what it would say on another design


@dataclass(frozen=True)
class PageCommand:
    """A command, and the lines its output must have."""

    command: str
    says: tuple[str, ...]


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def files_of(text: str) -> dict[str, str]:
    return dict(FILE.findall(text))


def steps_of(text: str, unsaid: tuple[str, ...] = FAILED) -> list[PageCommand]:
    """What is indented is a command or, after it, what that says, but for lines that begin as `unsaid`; a
    fence is a file.
    """
    steps: list[PageCommand] = []
    for line in INDENTED.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if line.startswith(COMMANDS):
            steps.append(PageCommand(line, ()))
        elif not line.startswith(unsaid):
            last = steps.pop()
            steps.append(PageCommand(last.command, (*last.says, line)))
    return steps


def lines_of(program: str) -> Sequence[str]:
    """Of it, those with something in them."""
    return [line for line in program.splitlines() if line.strip()]
