"""How far a campaign or a comparison is, on standard error: a bar on a terminal, else a line a point.

rich would draw the bar, but structlog imports rich where it is installed, which costs the start of every
daemon some 70 ms (docs/decisions/0012).
"""

from __future__ import annotations

import sys
from typing import TextIO

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.point import point_of

LENGTH = 30
NAME_MAX = 60
ERASE = "\r\x1b[2K"


class ProgressBar:
    """Called with each run as it ends; `done` of `total` there already were."""

    def __init__(self, done: int, total: int, file: TextIO | None = None) -> None:
        self._done = done
        self._total = total
        self._file = file or sys.stderr
        self._bar = self._file.isatty()

    def __enter__(self) -> ProgressBar:
        self._draw("")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._write(ERASE)

    def __call__(self, run: Run) -> None:
        self._done += 1
        how = f"FAILED: {run.problems[0]}" if run.problems else "ok"
        if run.problems or not self._bar:
            self._write(f"{ERASE * self._bar}[{self._done}/{self._total}] {point_of(run).key}: {how}\n")
        self._draw(f"{run.workload} {run.design}")

    def _draw(self, name: str) -> None:
        if self._bar:
            full = LENGTH * self._done // max(self._total, 1)
            bar = "█" * full + "░" * (LENGTH - full)
            self._write(f"{ERASE}{bar} {self._done}/{self._total} {name:.{NAME_MAX}}")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
