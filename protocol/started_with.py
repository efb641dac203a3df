"""What a daemon was started with, as its peers are told: a scenario needs options, and has not started it.

Said as a command line says it, one string an option with its value, the same for `--devices 4` and
`--devices=4`.  Where sockets and files lie is left out: that is not for whoever may ask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def options_in(words: Sequence[str]) -> list[str]:
    """`["--units", "4", "--no-pri"]` -> `["--units 4", "--no-pri"]`."""
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            found.append(word.replace("=", " ", 1))
        elif found:
            found[-1] += f" {word}"
    return found


class Parser(argparse.ArgumentParser):
    """One that tells apart what its daemon's peers may hear of."""

    def started_with(self, argv: Sequence[str] | None) -> tuple[str, ...]:
        private = {name for action in self._actions if action.type is Path for name in action.option_strings}
        given = options_in(sys.argv[1:] if argv is None else argv)
        return tuple(option for option in given if option.partition(" ")[0] not in private)
