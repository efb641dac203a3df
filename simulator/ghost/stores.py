"""What was stored to pages that log, and which report must tell of it (I25, R19).

User space copies a page after it was told of it.  A store is therefore told by each report that ends after
it, if the page is in that: also by one whose bits were taken before it.  A store whose page is in no report
under way must have its page marked for the next one, by the time a report ends that began after it: whoever
makes the store may mark the page a little later, but no report may pass the store by.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from simulator.ghost.violation import Verdicts

Page = tuple[Hashable, int]  # view, page of it


@dataclass(slots=True, eq=False)
class DirtyReport:
    """From when its marks are taken until user space has it."""

    view: Hashable
    began: int
    pages: set[int] = field(default_factory=set)


class Stores:
    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._logs: dict[Hashable, set[int]] = {}
        self._marked: set[Page] = set()
        self._untold: dict[Page, int] = {}  # since when
        self._reports: list[DirtyReport] = []

    def log(self, view: Hashable, start: int, end: int, on: bool) -> None:
        """Stores to these pages are to be told, or no more."""
        pages = self._logs.setdefault(view, set())
        if on:
            pages.update(range(start, end))
            return
        pages.difference_update(range(start, end))
        for there in [*self._untold, *self._marked]:
            if there[0] == view and start <= there[1] < end:
                self._untold.pop(there, None)
                self._marked.discard(there)

    def stored(self, epoch: int, view: Hashable, page: int) -> None:
        if page not in self._logs.get(view, ()):
            return
        if not any(report.view == view and page in report.pages for report in self._reports):
            self._untold.setdefault((view, page), epoch)

    def untold(self, view: Hashable) -> list[int]:
        return [page for where, page in self._untold if where == view]

    def move(self, view: Hashable, start: int, end: int, to: int) -> None:
        """These pages are those from `to` on now, and log as before."""
        untold = {page: since for (where, page), since in self._untold.items() if where == view}
        marked = {page for where, page in self._marked if where == view}
        self.log(view, start, end, False)
        self.log(view, to, to + end - start, True)
        for page in range(start, end):
            if page in untold:
                self._untold[view, page - start + to] = untold[page]
            if page in marked:
                self._marked.add((view, page - start + to))

    def marked(self, view: Hashable, page: int, *, on: bool = True) -> None:
        """A report that is still to come will have it, or none will any more."""
        (self._marked.add if on else self._marked.discard)((view, page))

    def begin(self, epoch: int, view: Hashable, pages: Iterable[int]) -> DirtyReport:
        """A report of these pages, whose marks are taken in this step."""
        report = DirtyReport(view, epoch, set(pages))
        self._reports.append(report)
        for page in report.pages:
            self._marked.discard((view, page))
            self._untold.pop((view, page), None)
        return report

    def end(self, report: DirtyReport) -> None:
        """User space has it."""
        self._reports.remove(report)
        self._judge(report.view, report.began)

    def settled(self, epoch: int) -> None:
        """Nothing is under way: every store is told, or its page marked."""
        for view in self._logs:
            self._judge(view, epoch)

    def _judge(self, view: Hashable, until: int) -> None:
        for (where, page), since in list(self._untold.items()):
            if where == view and since < until and (view, page) not in self._marked:
                self._verdicts.say("I25", f"page {page:#x} of {view} was stored to, and no report has it")
                del self._untold[where, page]
