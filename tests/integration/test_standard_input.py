"""`--exit-with-stdin`: a daemon ends with whoever holds the other end, and says so if there is none."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from qemu_shim.vmm.daemons import KVMD
from tests.kit.daemons import BIN, until
from tests.patience import PATIENCE_S


def command(directory: Path) -> list[str]:
    return [str(BIN / KVMD.name), "--socket", str(directory / "kvmd.sock"), "--exit-with-stdin"]


@pytest.mark.parametrize("standard_input", ["</dev/null", "<&-"])
def test_what_has_no_other_end_is_refused(tmp_path: Path, standard_input: str) -> None:
    argv = ["sh", "-c", f'exec "$@" {standard_input}', "sh", *command(tmp_path)]
    ended = subprocess.run(argv, stderr=subprocess.PIPE, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert b"--exit-with-stdin: standard input is no pipe, socket or terminal" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_terminal_is_an_end(tmp_path: Path) -> None:
    """Read behind its end it is EIO, again and again."""
    master, terminal = pty.openpty()
    daemon = subprocess.Popen(command(tmp_path), stdin=terminal, stderr=subprocess.PIPE)
    try:
        os.close(terminal)
        until((tmp_path / "kvmd.sock").exists, "kvmd is ready")
        os.close(master)
        _, told = daemon.communicate(timeout=PATIENCE_S)
    finally:
        daemon.kill()
    assert (daemon.returncode, b"level='error'" in told) == (0, False)
