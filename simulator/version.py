"""Which sources a result is of."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from qemu_shim.study.campaign.code import PACKAGES, ROOT

SIMULATED = (*PACKAGES, "simulator")
"""Of what a schedule comes to: records are no part, or one that is committed would be of other sources."""


def version(root: Path = ROOT) -> str:
    """The commit that changed them last, and a number over what has been changed since."""
    commit = _git(root, "log", "-1", "--format=%h", "--", *SIMULATED)
    changed = _git(root, "diff", "HEAD", "--binary", "--", *SIMULATED)
    if not commit:
        return "no version"
    return f"{commit}-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else commit


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return ran.stdout.strip()
