"""What a terminal shows while points run, and what a file gets."""

from __future__ import annotations

import io

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.progress import ERASE, LENGTH, ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*problems: str) -> Run:
    return Run("ring", "shared", 7, {"pages": 2}, problems=list(problems))


def test_a_terminal_has_a_bar_that_is_gone_at_the_end() -> None:
    file = Terminal()
    with ProgressBar(1, 4, file) as shown:
        shown(run())
    drawn = file.getvalue().split(ERASE)
    assert drawn[1] == "█" * (LENGTH // 4) + "░" * (LENGTH - LENGTH // 4) + " 1/4 "
    assert drawn[2].endswith(" 2/4 ring shared")
    assert drawn[-1] == ""


def test_a_file_gets_a_line_a_point_and_no_bar() -> None:
    file = io.StringIO()
    with ProgressBar(0, 2, file) as shown:
        shown(run())
        shown(run("I8: lost"))
    assert (
        file.getvalue() == "[1/2] ring/shared/7/pages=2: ok\n[2/2] ring/shared/7/pages=2: FAILED: I8: lost\n"
    )


def test_a_failure_stays_on_the_terminal() -> None:
    file = Terminal()
    with ProgressBar(0, 2, file) as shown:
        shown(run("I8: lost"))
    assert f"{ERASE}[1/2] ring/shared/7/pages=2: FAILED: I8: lost\n" in file.getvalue()


def test_nothing_to_do_is_drawn_as_well() -> None:
    file = Terminal()
    with ProgressBar(0, 0, file):
        pass
    assert file.getvalue().endswith(ERASE)
