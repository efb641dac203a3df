"""pytest's side of the markers `rfc` and `defect`: an unknown id ends the collection, outcomes are kept."""

from __future__ import annotations

import pytest

from tests.rfc.table import MARKERS, PASSED, complaint

WORST_LAST = (PASSED, "skipped", "failed")


def ids_by_marker(item: pytest.Item) -> dict[str, list[object]]:
    given: dict[str, list[object]] = {}
    for marker in MARKERS:
        marks = list(item.iter_markers(marker))
        if marks:
            given[marker] = [name for mark in marks for name in mark.args]
    return given


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wrong = {
        f"{function_of(item)}: {why}"
        for item in items
        for marker, ids in ids_by_marker(item).items()
        if (why := complaint(marker, ids))
    }
    if wrong:
        raise pytest.UsageError("\n".join(sorted(wrong)))


class Recorder:
    """The worst outcome of each id in each test function, over its parameters."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], str] = {}
        self._keys: dict[str, list[tuple[str, str]]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            names = [str(name) for ids in ids_by_marker(item).values() for name in ids]
            self._keys[item.nodeid] = [(name, function_of(item)) for name in names]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key in self._keys.get(report.nodeid, ()):
            worst = max(self.results.get(key, PASSED), report.outcome, key=WORST_LAST.index)
            self.results[key] = worst
