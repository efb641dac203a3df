"""`python3 -m tests.tutorial`: a fresh clone of what is committed does what the tutorial and the how-tos say.

Every command as it stands there, `make venv` first; status 1 and the output of the one that did otherwise.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tutorial.pages import ROOT, PageCommand, files_of, steps_of, text_of


def main() -> int:
    with TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        tutorial, howto = text_of("tutorial.md"), text_of("howto.md")
        steps = steps_of(tutorial)
        steps += [PageCommand(f".venv/bin/qemu-shim run {name}", ()) for name in files_of(howto)]
        for name, program in {**files_of(tutorial), **files_of(howto)}.items():
            (clone / name).write_text(program, encoding="utf-8")
        return not all(done(step, clone) for step in steps)


def done(step: PageCommand, clone: Path) -> bool:
    """Whether it ended well and said what it should; its output is shown if not."""
    ended = subprocess.run(
        step.command, shell=True, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = ended.stdout.splitlines()
    held = ended.returncode == 0 and all(line in lines for line in step.says)
    print(f"{'ok    ' if held else 'FAILED'} {step.command}", flush=True)
    if not held:
        print(f"{ended.stdout}\nstatus {ended.returncode}, expected 0 and {list(step.says)}")
    return held


sys.exit(main())
