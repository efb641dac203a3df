"""docs/tutorial.md, line by line, and each file of docs/howto.md: they work as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.scratch import Scratch, scratched
from tests.tidy.source import ROOT

FILE = re.compile(r"^`(\w+\.py)`.*?\n\n```python\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^    \.venv/bin/qemu-shim (.*)$", re.M)
LINES_MAX = 15


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


TUTORIAL, HOWTO = text_of("tutorial.md"), dict(FILE.findall(text_of("howto.md")))


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


def test_the_tutorials_commands_do_what_it_says(scratch: Scratch, tmp_path: Path) -> None:
    ((name, program),) = FILE.findall(TUTORIAL)
    assert len([line for line in program.splitlines() if line.strip()]) <= LINES_MAX
    (tmp_path / name).write_text(program)
    commands = COMMAND.findall(TUTORIAL)
    assert [command.split()[0] for command in commands] == ["run", "run", "compare", "campaign"]
    for command in commands:
        words = [str(tmp_path / word) if word in (name, "runs") else word for word in shlex.split(command)]
        status, out, err = scratch.run(*words)
        assert status == 0, out + err
        assert words[0] != "run" or out.splitlines()[-1] == "two-devices: ok"
    status, out, _ = scratch.run("run", str(tmp_path / name), "--design", "pinned")
    assert (status, "FAILED: pages read back from swap: 0, expected 1" in out) == (1, True)


@pytest.mark.parametrize("name", HOWTO)
def test_a_how_to_works(scratch: Scratch, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(HOWTO[name])
    status, out, err = scratch.run("run", str(tmp_path / name))
    assert status == 0, out + err


def test_every_block_of_the_how_tos_is_played() -> None:
    assert len(HOWTO) == text_of("howto.md").count("```python") == 6
