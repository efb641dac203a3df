"""The command line that all daemons share: where they listen, what they say, when they end.

Must hold: it is read, and refused, before what serves is imported: `--help` waits for none of that, and
neither does who got an option wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol.started_with import Parser
from protocol.units import GIB, KIB, MIB, TIB

LOG_LEVELS = ("debug", "info", "warning", "error")
_SUFFIX = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parser(name: str, what: str) -> Parser:
    """The options all daemons share."""
    options = Parser(prog=name, description=what)
    options.add_argument(
        "--socket", type=Path, required=True, metavar="PATH", help="Unix socket to listen on"
    )
    options.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    options.add_argument(
        "--trace", type=Path, metavar="FILE", help="write tracepoints, named and printed as the kernel's"
    )
    options.add_argument(
        "--exit-with-stdin", action="store_true", help="stop when standard input ends (set by a supervisor)"
    )
    return options


def bytes_of(text: str) -> int:
    """`16G` -> bytes.  Raises argparse's error for anything else."""
    number, suffix = (text[:-1], text[-1:].upper()) if text[-1:].upper() in _SUFFIX else (text, "")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M, 16G or 2T")
    return int(number) * _SUFFIX.get(suffix, 1)
