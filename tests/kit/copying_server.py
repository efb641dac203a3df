"""tests.vfio_user.serve_copying as a process, and what it has to tell when it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.kit.daemons import until
from tests.patience import PATIENCE_S


class CopyingServer:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "dsa.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.vfio_user.serve_copying", str(self.path)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        until(self.path.exists, "the server listens")

    def seen(self) -> dict[str, int]:
        """Ends it, in which no mistake of its own may have come to light."""
        out, _ = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0
        counts: dict[str, int] = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
        return counts
