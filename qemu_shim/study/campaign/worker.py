"""A worker process: points come in a line each on standard input, their runs go out on standard output.

    python -m qemu_shim.study.campaign.worker SCRATCH

Standard input is also what says stop: when it ends, by the campaign's will or by its death, a point that runs
is given up, its daemons are stopped, and the worker ends.  SCRATCH, which is the worker's own, goes with it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from functools import partial

import trio

from protocol.daemon import configure_log
from qemu_shim.study.campaign.execute import execute
from qemu_shim.study.campaign.point import line_of, point_from, run_as_json

STDIN = 0


def main() -> None:
    scratch = sys.argv[1]
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever prints does not print into the results
    configure_log("warning")
    tempfile.tempdir = scratch
    try:
        while line := _next_line():
            run = execute(point_from(json.loads(line)), partial(trio.lowlevel.wait_readable, STDIN))
            if run is None:
                break
            results.write(line_of(run_as_json(run)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _next_line() -> bytes:
    """Unbuffered, so that what is not read yet is still there to be waited for."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(STDIN, 1 << 16)
        if not piece:
            return b""
        line += piece
    return line


if __name__ == "__main__":
    main()
