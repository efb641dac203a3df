"""Does the killer of each plant fail with it on?  In forks of one process that has everything imported.

`python -m tests.planted.killing ID...` prints, as JSON, which of them do not.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.planted.sweep import ROOT, killers, outcomes

# What a fork has of us pytest would import itself, to rewrite the asserts of its plugins.
PLUGINS = ("hypothesis", "pytest_trio.plugin", "xdist.plugin")
IMPORTED_ALREADY = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def fails(plant: str, into: Path) -> bool:
    """Of the first killer on the list; a fork runs it, so that the next begins as this one did."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            outcomes([killers()[plant][0], "--plant", plant, *IMPORTED_ALREADY], into)
        finally:
            os._exit(0)  # whatever it came to: what is above us is the parent's
    os.waitpid(child, 0)
    return bool(json.loads(into.read_text(encoding="utf-8"))["failed"])


def survivors(plants: list[str]) -> list[str]:
    kit = sorted(f"tests.kit.{path.stem}" for path in (ROOT / "tests" / "kit").glob("*.py"))
    for module in (*PLUGINS, *kit):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # no fork looks at what is here for garbage, and copies it by that
    with tempfile.TemporaryDirectory() as made:
        return [plant for plant in plants if not fails(plant, Path(made) / f"{plant}.json")]


if __name__ == "__main__":
    print(json.dumps(survivors(sys.argv[1:])))
