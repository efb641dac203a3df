"""How far a campaign is, on standard error: a bar on a terminal, else a line a point."""

from __future__ import annotations

import sys
from types import TracebackType

from qemu_shim.campaign.point import point_of
from qemu_shim.compare.run import Run

WIDTH = 30


class Progress:
    """Called with each run as it ends; `done` of `total` there already were."""

    def __init__(self, done: int, total: int) -> None:
        self._done = done
        self._total = total
        self._tty = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._bar("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._tty:
            print(file=sys.stderr)

    def __call__(self, run: Run) -> None:
        self._done += 1
        name = point_of(run).key
        if run.problems or not self._tty:
            clear = "\r\x1b[K" if self._tty else ""
            how = f"FAILED: {run.problems[0]}" if run.problems else "ok"
            print(f"{clear}[{self._done}/{self._total}] {name}: {how}", file=sys.stderr, flush=True)
        self._bar(name)

    def _bar(self, name: str) -> None:
        if self._tty:
            filled = WIDTH * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (WIDTH - filled)
            print(
                f"\r\x1b[K[{bar}] {self._done}/{self._total} {name:.50}", end="", file=sys.stderr, flush=True
            )
