"""The log: written where it can be, left out where it cannot, and never more of one thing than is of use."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import structlog

from protocol.log import BURST, INTERVAL_S, MAX_LINES, LogFile, RateLimit
from tests.patience import PATIENCE_S


def test_a_file_on_disk_has_each_line_at_once(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        log = LogFile(file.fileno())
        log.write("one\n")
        log.write("tw\udcff\n")
        assert (tmp_path / "log").read_bytes() == b"one\ntw\\udcff\n"


def test_a_pipe_gets_all_of_it_in_order() -> None:
    reader, writer = os.pipe()
    log = LogFile(writer)
    for n in range(100):
        log.write(f"{n}\n")
    assert log.drain(PATIENCE_S)
    assert os.read(reader, 1 << 16).split() == [b"%d" % n for n in range(100)]
    os.close(reader)
    os.close(writer)


def test_a_pipe_nobody_reads_costs_lines_and_says_how_many() -> None:
    reader, writer = os.pipe()
    log = LogFile(writer)
    line = "x" * 999 + "\n"
    for _ in range(3 * MAX_LINES):
        log.write(line)
    assert not log.drain(0.01)
    seen, shown, lost = b"", 0, 0
    while shown + lost < 3 * MAX_LINES:  # it says so behind those it took then, and others may follow
        seen += os.read(reader, 1 << 16)
        shown, lost = seen.count(line.encode()), sum(map(int, re.findall(rb"(\d+) lines", seen)))
    assert shown + lost == 3 * MAX_LINES
    assert log.drain(PATIENCE_S)
    assert lost >= MAX_LINES - 66  # all but a full queue, what it held by then, and a pipe of 64 KiB
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("kind", ["no reader", "/dev/full", "nothing"])
def test_what_cannot_be_written_is_nobodys_problem(kind: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    log = LogFile({"no reader": writer, "/dev/full": full, "nothing": None}[kind])
    for _ in range(3):
        log.write("x\n")
        assert log.drain(PATIENCE_S)
    os.close(writer)
    os.close(full)


def test_one_event_is_limited_in_rate_and_hides_no_other() -> None:
    now = 0.0
    limit = RateLimit(lambda: now)

    def shown(event: str, count: int) -> list[object]:
        seen: list[object] = []
        for _ in range(count):
            with suppress(structlog.DropEvent):
                seen.append(limit(None, "info", {"event": event}).get("left_out"))
        return seen

    assert shown("flood", 10 * BURST) == [None] * BURST
    assert shown("other", 1) == [None]
    now += INTERVAL_S
    assert shown("flood", 2) == [9 * BURST, None]
