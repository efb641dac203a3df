"""One guest from its first line to its last: what it says is read line by line, and judged by its results.

[    4.321000] guest: result dma ok channel=dma0chan0 passed=10 of=10
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Final

from guest.failure import GuestError

_SAID: Final = re.compile(r"^(?:\[ *(?P<at>\d+\.\d+)\] )?guest: (?P<what>.*)$")
_RESULT: Final = re.compile(r"result (?P<name>\S+) (?P<status>ok|failed|absent)(?: (?P<detail>.*))?")
_BROKEN: Final = re.compile(r"\b(BUG: |Oops: |WARNING: |Kernel panic|general protection fault)")
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[c()]B?|[\x00-\x08\x0b-\x1f\x7f]")
_LINE_BYTES_MAX: Final = 64 << 10
LAST_LINES: Final = 20
_GRACE_S: Final = 5.0
_READ_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class GuestResult:
    """`status`: ok, failed, or absent, where what is to be tried is not there."""

    name: str
    status: str
    detail: str = ""


@dataclass
class Console:
    """What the guest has said so far; fed with bytes as they come."""

    lines: list[str] = field(default_factory=list)
    results: list[GuestResult] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what the kernel said of itself
    said: list[str] = field(default_factory=list)  # all lines of `guest: `, without that
    ended: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that are whole now."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES_MAX:
            whole, self._rest = [*whole, self._rest], b""
        for raw in whole:
            line = _CONTROL.sub("", raw.decode(errors="replace"))
            self.lines.append(line)
            self._judge(line)
            yield line

    def _judge(self, line: str) -> None:
        if not (match := _SAID.match(line)):
            if _BROKEN.search(line):
                self.broken.append(line)
            return
        self.said.append(match["what"])
        if match["what"] == "end":
            self.ended = True
        elif result := _RESULT.fullmatch(match["what"]):
            self.results.append(GuestResult(result["name"], result["status"], result["detail"] or ""))

    def failed(self) -> list[GuestResult]:
        return [result for result in self.results if result.status == "failed"]

    def last(self, count: int) -> list[str]:
        rest = self._rest.decode(errors="replace")
        return [*self.lines, *([_CONTROL.sub("", rest)] if rest else [])][-count:]


@dataclass(frozen=True)
class Ending:
    console: Console
    seconds: float
    status: int  # the emulator's

    def complaints(self) -> list[str]:
        """Why this was no success: nothing, if the guest did all that it was asked to."""
        console = self.console
        found = [f"{result.name}: {result.detail or 'failed'}" for result in console.failed()]
        found += [f"its kernel said: {line}" for line in console.broken[:1]]
        if not console.ended:
            last = "\n  ".join(console.last(LAST_LINES)) or "(nothing)"
            found.append(f"it did not come to its end; the last of its console:\n  {last}")
        elif not console.results:
            found.append("it had nothing to say")
        if self.status:
            found.append(f"the emulator ended with {self.status}")
        return found


def boot(command: Sequence[str], *, timeout_s: float, on_line: Callable[[str], None] | None = None) -> Ending:
    """Until the emulator ends; it is ended if the guest takes longer, or this process is interrupted."""
    console, start = Console(), time.monotonic()
    process = None
    try:
        with interrupts_held():
            process = _started(command)
        assert process.stdout is not None
        for data in _reads(process.stdout, start + timeout_s):
            for line in console.feed(data):
                if on_line:
                    on_line(line)
        status = process.wait(max(0.0, start + timeout_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        shown = "\n  ".join(console.last(LAST_LINES)) or "(nothing)"
        raise GuestError(
            f"the guest did not end within {timeout_s:g} s; the last of its console:\n  {shown}"
        ) from None
    finally:
        if process is not None:
            end(process)
    return Ending(console, time.monotonic() - start, status)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C comes afterwards: not while a process runs already that nobody can name yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Not in the terminal's foreground group: Ctrl-C is ours."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )


def _reads(stream: IO[bytes], deadline: float) -> Iterator[bytes]:
    """Until its end, or the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                data = os.read(stream.fileno(), _READ_BYTES)
                if not data:
                    return
                yield data


def end(process: subprocess.Popen[bytes]) -> None:
    """Gone it is afterwards, whatever it makes of being asked."""
    with interrupts_held():
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def converse(command: Sequence[str]) -> int:
    """The console on this terminal; Ctrl-C is the guest's.  The emulator's exit status."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, check=False, restore_signals=True).returncode
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """One line on a terminal that says how far it is; without a terminal, what the guest itself says."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._live, self._start = stream, stream.isatty(), time.monotonic()
        self._shown = 0.0

    def __call__(self, line: str) -> None:
        now, said = time.monotonic(), _SAID.match(line)
        stamp = f"{now - self._start:6.1f} s  "
        if said:
            self._stream.write(("\r\x1b[K" if self._live else "") + stamp + said["what"] + "\n")
        elif self._live and now - self._shown > 0.1:
            self._stream.write("\r\x1b[K" + (stamp + line)[:100])
            self._shown = now
        self._stream.flush()

    def close(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
