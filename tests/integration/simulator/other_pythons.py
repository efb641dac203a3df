"""Other Pythons of this machine that the project supports, with its run-time packages in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from tests.patience import WHOLE_RUN_S

ROOT = Path(__file__).resolve().parents[3]
LOCK = ROOT / "requirements.lock"
OLDEST = 11  # `requires-python` of pyproject.toml
FURTHEST = 19  # as far as is looked
PYENV = Path.home() / ".pyenv" / "versions"


class NoPackagesError(Exception):
    """They could not be installed; the message says why."""


def minor_of(python: str | Path) -> int | None:
    """`n` of a CPython 3.n that runs; None: it does not."""
    asked = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
    try:
        ran = subprocess.run(
            [python, "-c", asked], capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False
        )
    except OSError:
        return None
    match ran.stdout.split():
        case ["cpython", "3", minor]:
            return int(minor)
    return None


def _named() -> Iterator[str | Path]:
    for minor in range(OLDEST, FURTHEST + 1):
        found = shutil.which(f"python3.{minor}")
        if found is not None:
            yield found
        yield from sorted(PYENV.glob(f"3.{minor}.*/bin/python3.{minor}"))


def others() -> dict[int, str | Path]:
    """By minor version, this one's left out: the oldest supported and the newest there is."""
    there: dict[int, str | Path] = {}
    for python in _named():
        minor = minor_of(python)
        if minor is not None and minor >= OLDEST:
            there.setdefault(minor, python)
    mine = sys.version_info.minor
    ends = {min([mine, *there]), max([mine, *there])} - {mine}
    return {minor: there[minor] for minor in sorted(ends)}


def with_packages(minor: int, python: str | Path) -> Path:
    """An interpreter of an environment that is made once for each lock, under build/.  NoPackagesError."""
    of_lock = sha256(LOCK.read_bytes()).hexdigest()[:12]
    made = ROOT / "build" / f"python3.{minor}-{of_lock}"
    stamp, inside = made / "made.stamp", made / "bin" / "python"
    if not stamp.exists():
        _run(python, "-m", "venv", "--clear", made)
        _run(inside, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", LOCK)
        stamp.touch()
    return inside


def _run(*words: str | Path) -> None:
    ran = subprocess.run(words, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    if ran.returncode:
        last = (ran.stderr.strip() or "no word of why").splitlines()[-1]
        raise NoPackagesError(f"{words[1]} {words[2]} of {words[0]}: {last}")
