"""Who asks what there is waits for nothing that serves, and is told so in any case."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qemu_shim.commands import COMMANDS
from tests.kit.daemons import BIN

SERVING = ("trio", "pydantic", "structlog", "msgpack", "greenlet", "qemu_shim.cli", "protocol.daemon")
TOLD = """
import sys
from {module}.__main__ import main
try:
    main({words!r})
except SystemExit as ended:
    print(ended.code, *sorted({serving!r} & sys.modules.keys()))
"""


@pytest.mark.parametrize("module", ["kvmd", "iommufdd", "device_sim", "qemu_shim"])
@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--no-such-option"], 2), ([], 2)])
def test_help_and_what_is_wrong_wait_for_nothing_that_serves(
    module: str, words: list[str], status: int
) -> None:
    script = TOLD.format(module=module, words=words, serving=set(SERVING))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(status)
    assert "usage: " in run.stdout + run.stderr


def test_each_command_is_one_that_the_command_line_has_options_for() -> None:
    for command in COMMANDS:
        run = subprocess.run([BIN / "qemu-shim", command, "--help"], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")
        assert f"usage: qemu-shim {command} " in run.stdout
