"""docs/tour.md, command by command: what it says is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qemu_shim.cli import main
from tests.tutorial.pages import files_of, lines_of, steps_of, text_of

TOUR = text_of("tour.md")
SHIM = ".venv/bin/qemu-shim"
LINES_MAX = 15  # of the file, with its imports
ANYTHING = "..."


def says(line: str, out: str) -> bool:
    """A line of it, in which `...` stands for what changes with the code, and blanks are one blank."""
    pattern = r".*".join(re.escape(" ".join(part.split())) for part in line.split(ANYTHING))
    pattern = pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*")
    return any(re.fullmatch(pattern, " ".join(each.split())) for each in out.splitlines())


def comes_in_order(parts: list[str], out: str) -> bool:
    """In the rows of a diagram, whose columns are wrapped."""
    text, at = re.sub(r"[\s*]+", " ", out), 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_the_tours_commands_print_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((name, program),) = files_of(TOUR).items()
    assert len(lines_of(program)) <= LINES_MAX
    Path(name).write_text(program, encoding="utf-8")
    besides = TOUR.replace(f"```python\n{program}```\n", "")
    (shown,) = re.findall(r"^```\n(.*?)^```", besides, re.M | re.S)
    steps = steps_of(TOUR, unsaid=())
    assert len(steps) == 6
    for step in steps:
        shim, *words = shlex.split(step.command)
        assert shim == SHIM
        status = main([*words, "--workers", "1"] if name in words else words)
        out = capsys.readouterr().out
        assert status == ("--plant" in words or "--replay" in words), out
        for line in step.says:
            assert says(line, out), f"{step.command} does not say {line!r}:\n{out}"
        if "--replay" in words:
            assert comes_in_order(shown.splitlines(), out), out
            assert "the trace is another one" not in out
    (trace,) = Path().glob("*.trace")
    assert "kvmd: kvm_tdp_mmu_spte_changed: " in trace.read_text(encoding="utf-8")


def test_a_story_is_replayed_from_a_mail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((name, program),) = files_of(TOUR).items()
    Path(name).write_text(program, encoding="utf-8")
    plant = next(
        words[-3:-1] for step in steps_of(TOUR, unsaid=()) if "--plant" in (words := step.command.split())
    )
    assert main(["sim", name, "--workers", "1", "--schedules", "100", "--plant", plant[0]]) == 1
    told = capsys.readouterr().out
    failed = re.search(r"^FAILED: (.*)$", told, re.M)
    assert failed is not None
    story = told[told.index("tdp-share story") :]
    mail = "Hello,\n\nsee below.\n\n" + "".join(f"> {line}\n" for line in story.splitlines()) + "-- \nme\n"
    Path("mail").write_text(mail, encoding="utf-8")
    assert main(["sim", "--replay", "mail"]) == 1
    assert failed[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "out", "held"),
    [
        ("a ... b", "a 17 b", True),
        ("a ... b", "a 17 c", False),
        ("FAILED: ...: x", "FAILED:  I8:  x", True),
        ("a b", "xa b", False),
    ],
)
def test_another_line_is_not_taken_for_it(line: str, out: str, held: bool) -> None:
    assert says(line, out) is held


def test_steps_in_another_order_are_not_the_same() -> None:
    out = "  a   b\n*     c\n      d e\n"
    assert comes_in_order(["a b", "c d", "e"], out)
    assert not comes_in_order(["c", "a b"], out)
