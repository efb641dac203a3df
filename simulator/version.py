"""Which sources a result is of.

A commit says so where the tree is as it was committed.  Else their contents do, as a number: of a file that
git does not know, or where there is no git, nothing else could.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from qemu_shim.study.campaign.code import PACKAGES, ROOT, digest_of

SIMULATED = (*PACKAGES, "simulator")
"""Of what a schedule comes to: records are no part, or one that is committed would be of other sources."""
NO_COMMIT = "no-commit"


def version(root: Path = ROOT) -> str:
    """The commit that changed them last, and a number over all of them if they are not as it left them."""
    commit = _git(root, "log", "-1", "--format=%h", "--", *SIMULATED)
    changed = _git(root, "diff", "HEAD", "--name-only", "--", *SIMULATED)
    unknown = _git(root, "ls-files", "--others", "--", *(f":(glob){name}/**/*.py" for name in SIMULATED))
    if commit and changed == unknown == "":
        return commit
    return f"{commit or NO_COMMIT}-{digest_of(root, SIMULATED)[:8]}"


def _git(root: Path, *words: str) -> str | None:
    """What it says; None: it cannot say, which is not that there is nothing."""
    try:
        ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return None if ran.returncode else ran.stdout.strip()
