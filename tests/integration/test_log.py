"""Whatever standard error is, a daemon starts, serves and stops."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.log import BURST
from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec
from tests.integration.attacks import huge_length
from tests.integration.plain import Plain
from tests.kit.daemons import System, short_directory, system, until
from tests.patience import PATIENCE_S

ENOUGH = 10 * BURST  # breaches, each a line of the log


def unread() -> list[int]:
    """A full pipe whose reader, the second fd, reads nothing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return [writer, reader]


def without_reader() -> list[int]:
    reader, writer = os.pipe()
    os.close(reader)
    return [writer]


def full_disk() -> list[int]:
    return [os.open("/dev/full", os.O_WRONLY)]


@pytest.mark.parametrize("stderr", [unread, without_reader, full_disk], ids=lambda made: str(made.__name__))
@pytest.mark.parametrize("spec", DAEMONS, ids=lambda spec: str(spec.name))
def test_a_daemon_serves_whatever_becomes_of_its_log(
    spec: DaemonSpec, stderr: Callable[[], list[int]]
) -> None:
    with short_directory() as directory:
        others = System(directory)
        if spec.needs:
            others.start(*spec.needs)
        fds = stderr()
        daemon = subprocess.Popen(
            [*others.argv(spec), "--log-level", "debug"], stdin=subprocess.PIPE, stderr=fds[0]
        )
        try:
            _serves(others.socket(spec.name))
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(PATIENCE_S) == 0
        finally:
            daemon.kill()
            daemon.wait()
            assert daemon.stdin is not None
            daemon.stdin.close()
            for fd in fds:
                os.close(fd)
            others.check_stop()


def test_a_daemon_without_standard_error_writes_its_log_nowhere() -> None:
    """The number 2 is another file's then, of the daemon's own."""
    with short_directory() as directory:
        made = System(directory)
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *made.argv(DAEMONS[0])]
        daemon = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            _serves(made.socket("kvmd"))
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(PATIENCE_S) == 0
        finally:
            daemon.kill()
            daemon.wait()
            assert daemon.stdin is not None
            daemon.stdin.close()


def test_a_flood_of_one_event_is_cut_short_and_other_events_are_not() -> None:
    with system(None, None, "kvmd") as running:
        for _ in range(ENOUGH):
            _breach(running.socket("kvmd"))
        running.signal("kvmd", signal.SIGTERM)
        until(lambda: running.exited("kvmd"), "kvmd has ended")
        log = running.log("kvmd")
        assert BURST <= log.count("connection ends") < ENOUGH
        assert "event='stopped'" in log


def _serves(path: Path) -> None:
    until(path.exists, "it is ready")
    for _ in range(20):
        _breach(path)
    peer = Plain.connect(path)
    assert peer.ask("STATS")[0]
    peer.close()


def _breach(path: Path) -> None:
    peer = Plain.connect(path)
    huge_length(peer)
    assert peer.hung_up()
    peer.close()
