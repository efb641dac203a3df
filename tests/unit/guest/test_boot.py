"""What a guest says, judged; and that nothing of it stays, with a script in the emulator's place."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from guest.boot import Console, Ending, GuestResult, Progress, boot, end
from guest.failure import GuestError
from tests.kit.daemons import until
from tests.patience import PATIENCE_S

GOOD = b"""[    0.1] Linux\r
[    2.861440] guest: kernel 6.1\r
[    2.9] guest: result pci ok functions=4\r
[    3.0] guest: result dsa absent\r
guest: result dma ok\r
[    3.1] guest: end\r
"""


def console(data: bytes) -> Console:
    found = Console()
    for _ in found.feed(data):
        pass
    return found


def complaints(data: bytes, status: int = 0) -> list[str]:
    return Ending(console(data), 1.0, status).complaints()


def test_results_are_read() -> None:
    found = console(GOOD)
    assert found.results == [
        GuestResult("pci", "ok", "functions=4"),
        GuestResult("dsa", "absent"),
        GuestResult("dma", "ok"),
    ]
    assert found.said[0] == "kernel 6.1"
    assert complaints(GOOD) == []


@pytest.mark.parametrize("piece", [1, 2, 7, 100])
def test_in_whatever_pieces_they_come(piece: int) -> None:
    found = Console()
    lines = [line for n in range(0, len(GOOD), piece) for line in found.feed(GOOD[n : n + piece])]
    assert lines == found.lines == console(GOOD).lines
    assert found.results == console(GOOD).results


END = b"guest: end\n"


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"guest: result dma failed wrong=copied\n" + END, 0, "dma: wrong=copied"),
        (b"guest: result dma failed\n" + END, 0, "dma: failed"),
        (b"guest: result dma ok\n", 0, "did not come to its end"),
        (b"guest: result dma ok\nhalf a li", 0, "half a li"),
        (END, 0, "nothing to say"),
        (b"guest: result dma ok\n" + END, 1, "the emulator ended with 1"),
        (b"[ 1.0] BUG: kernel NULL pointer\nguest: result dma ok\n" + END, 0, "BUG: kernel NULL pointer"),
        (b"[ 1.0] WARNING: CPU: 0 PID: 1\nguest: result dma ok\n" + END, 0, "WARNING: CPU"),
        (b"[ 1.0] Kernel panic - not syncing\n", 0, "Kernel panic"),
    ],
)
def test_what_went_wrong_is_said(data: bytes, status: int, says: str) -> None:
    assert any(says in complaint for complaint in complaints(data, status))


def test_what_is_no_result_is_none() -> None:
    data = b"guest: result\nguest: result x perhaps\n x guest: result y ok\n"
    data += b"guest: results z ok\n[x] guest: result z ok\n"
    assert console(data).results == []


def test_a_console_may_say_anything() -> None:
    found = console(
        b"\xff\xfe\x00\x1b[2J\x1b[31mred\x07\n"
        + b"x" * 200_000
        + b"\nguest: result dma ok\n"
        + os.urandom(999)
    )
    assert found.lines[0].endswith("red")
    assert "\x1b" not in "".join(found.lines)
    assert found.results == [GuestResult("dma", "ok")]


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_boot_ends_with_its_emulator() -> None:
    seen: list[str] = []
    ending = boot(script(f"import os; os.write(1, {GOOD!r})"), timeout_s=PATIENCE_S, on_line=seen.append)
    assert ending.complaints() == []
    assert seen == ending.console.lines


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


@pytest.mark.parametrize("ends", ["exec sleep 1000", "exec sleep 1000 >&- 2>&-"])
def test_one_that_does_not_end_is_ended_and_its_last_lines_shown(tmp_path: Path, ends: str) -> None:
    said = tmp_path / "pid"
    with pytest.raises(GuestError, match=r"(?s)did not end within 1 s.*the last of it"):
        boot(shell(f"echo $$ >{said}; echo the last of it; {ends}"), timeout_s=1)
    assert is_gone(int(said.read_text()))


def is_gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def test_one_that_will_not_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest.boot._GRACE_S", 0.2)
    process = subprocess.Popen(
        shell("trap '' TERM; echo x; while :; do sleep 1; done"), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"x\n"
    end(process)
    assert process.returncode == -signal.SIGKILL


def test_an_interrupted_boot_leaves_nothing(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    inner = shell(f"echo $$ >{said}; exec sleep 1000")
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    outer = f"{heard}; from guest.boot import boot; boot({inner!r}, timeout_s=1000)"
    process = subprocess.Popen(script(outer), cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL)
    try:
        until(lambda: said.exists() and said.read_text() != "", "the emulator runs")
        process.send_signal(signal.SIGINT)  # which a shell's background jobs ignore, and so do their children
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert is_gone(int(said.read_text()))


def test_without_a_terminal_what_the_guest_says_is_shown() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for line in console(GOOD).lines:
        progress(line)
    progress.close()
    shown = [line.split(" s  ")[1] for line in stream.getvalue().splitlines()]
    assert shown == console(GOOD).said


def test_on_a_terminal_there_is_one_line_that_moves() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream)
    progress("[    0.1] Linux")
    time.sleep(0.11)
    progress("[    0.2] memory " + "x" * 500)
    progress("guest: end")
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert max(len(part) for part in stream.getvalue().split("\r")) < 120
