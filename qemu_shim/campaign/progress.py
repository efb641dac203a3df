"""How far a campaign is, on standard error: a bar on a terminal, else a line a point."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qemu_shim.campaign.point import point_of
from qemu_shim.compare.run import Run

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Shown:
    """Called with each run as it ends; `done` of `total` there already were."""

    def __init__(self, done: int, total: int) -> None:
        self._done = done
        self._total = total
        self._console = console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("campaign", total=total, completed=done)

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, run: Run) -> None:
        self._done += 1
        how = f"FAILED: {run.problems[0]}" if run.problems else "ok"
        if run.problems or not self._console.is_terminal:
            self._console.print(f"[{self._done}/{self._total}] {point_of(run).key}: {how}")
        self._bar.update(self._task, completed=self._done, description=f"{run.workload} {run.design}")
