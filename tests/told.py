"""What a test tells people though it passed: `record_property(TOLD, "a sentence")`, shown at the end."""

from __future__ import annotations

import pytest

TOLD = "told"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = [
        f"{report.nodeid}: {value}"
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == TOLD
    ]
    if told:
        terminalreporter.section("told")
        for line in told:
            terminalreporter.write_line(line)
