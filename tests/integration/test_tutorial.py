"""docs/tutorial.md, line by line, and each file of docs/howto.md: they work as they stand there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.scratch import Scratch, scratched
from tests.tidy.source import ROOT
from tests.tutorial.pages import files_of, lines_of, steps_of, text_of

SHIM = ".venv/bin/qemu-shim"
LINES_MAX = 15
TUTORIAL, HOWTO = text_of("tutorial.md"), files_of(text_of("howto.md"))


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


def test_the_tutorials_commands_do_what_it_says(scratch: Scratch, tmp_path: Path) -> None:
    """In this environment; `.ci/run` has a fresh clone do the same (`python3 -m tests.tutorial`)."""
    ((name, program),) = files_of(TUTORIAL).items()
    assert len(lines_of(program)) <= LINES_MAX
    (tmp_path / name).write_text(program)
    first, *steps = steps_of(TUTORIAL)
    assert first.command == "make venv"
    commands = [shlex.split(step.command) for step in steps]
    assert [command[:2] for command in commands] == [
        [SHIM, each] for each in ("run", "run", "compare", "campaign")
    ]
    assert steps[0].says == ("two-devices: ok",)
    for (_, *words), step in zip(commands, steps, strict=True):
        status, out, err = scratch.run(*(str(tmp_path / it) if it in (name, "runs") else it for it in words))
        assert status == 0, out + err
        assert all(line in out.splitlines() for line in step.says)
    status, out, _ = scratch.run("run", str(tmp_path / name), "--design", "pinned")
    assert (status, "FAILED: pages read back from swap: 0, expected 1" in out) == (1, True)


def test_a_fresh_clone_does_the_tutorial_in_ci() -> None:
    assert "python3 -m tests.tutorial\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOWTO)
def test_a_how_to_works(scratch: Scratch, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(HOWTO[name])
    status, out, err = scratch.run("run", str(tmp_path / name))
    assert status == 0, out + err


def test_every_block_of_the_how_tos_is_played() -> None:
    assert len(HOWTO) == text_of("howto.md").count("```python") > 0
