"""`python -m bench`: measure every figure beside its limit and its rivals, and print one table.

Exit status: 0 all ratios as wanted, 1 a ratio missed, 3 a ratio not measured (no C compiler, no
grpcio, or our side is not there), 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.figures import FIGURES
from bench.harness import Bench, run
from bench.report import as_json, as_text, exit_status

ROUNDS, SAMPLES = 7, 20_000
QUICK_ROUNDS, QUICK_SAMPLES = 3, 2_000


def main() -> int:
    names = [figure.name for figure in FIGURES]
    parser = argparse.ArgumentParser(prog="python -m bench", description="figures beside their limits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, roughly where we are")
    only = ", ".join(names)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=only)
    args = parser.parse_args()
    chosen = [figure for figure in FIGURES if figure.name in args.only]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        rounds, samples = (QUICK_ROUNDS, QUICK_SAMPLES) if args.quick else (ROUNDS, SAMPLES)
        measured, results = run(chosen, Bench(Path(scratch), rounds, samples))
    sys.stdout.write(as_text(measured, results))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(measured, results), indent=2) + "\n", encoding="utf-8")
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
