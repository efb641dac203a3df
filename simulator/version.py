"""Which sources a result is of."""

from __future__ import annotations

import subprocess

from qemu_shim.study.campaign.code import PACKAGES, ROOT

SIMULATED = (*PACKAGES, "simulator")
"""Of what a schedule comes to: records are no part, or one that is committed would be of other sources."""


def version() -> str:
    """The commit that changed them last."""
    commit = _git("log", "-1", "--format=%h", "--", *SIMULATED)
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *SIMULATED)
    return f"{commit}-dirty" if commit and changed else commit or "no version"


def _git(*words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()
