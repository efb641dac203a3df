"""What a change costs: every figure of this tree and of another one, alternately, in one run.

    python -m bench.against TREE [--rounds N] [--only FIGURE ...] [--json FILE]

TREE is a clone at another commit with its own environment (`make venv-bench` in it).  A round runs each
figure once here and once there, `--quick`, the one that begins changing from round to round; a contender's
ratio is taken within each round, ours by theirs, and the median over rounds is printed.  Rivals are the
same program on both sides: how far their ratios are from 1 is what the machine's noise does to a ratio.

Exit status: 0, or 2 if the arguments are wrong or a figure cannot be measured here or there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.figures import FIGURES

HERE = Path(__file__).parent.parent
ROUNDS = 7
EXITS = (0, 1, 3)  # of `python -m bench`: a missed ratio or a missing rival does not hinder us


class CannotMeasureError(Exception):
    """The message says which tree, which figure, and what it printed."""


@dataclass(slots=True)
class Pair:
    """One contender: a p50 of each round here, and one there."""

    here: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.here, self.there, strict=True)]


def main() -> int:
    names = [figure.name for figure in FIGURES]
    parser = argparse.ArgumentParser(prog="python -m bench.against", description="this tree beside another")
    parser.add_argument("tree", type=Path, metavar="TREE", help="a clone with its own .venv")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="FIGURE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every p50 to FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    try:
        pairs = compare(args.tree.resolve(), args.only, args.rounds)
    except CannotMeasureError as error:
        print(f"bench.against: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(as_text(pairs))
    if args.json is not None:
        rows = {name: {"here": pair.here, "there": pair.there} for name, pair in pairs.items()}
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(tree: Path, figures: list[str], rounds: int) -> dict[str, Pair]:
    pairs: dict[str, Pair] = defaultdict(Pair)
    for where in (HERE, tree):
        compiled(where)
    for number in range(rounds):
        for figure in figures:
            order = (HERE, tree) if number % 2 else (tree, HERE)
            told = {where: measure(where, figure) for where in order}
            for name in told[HERE].keys() & told[tree].keys():
                pairs[name].here.append(told[HERE][name])
                pairs[name].there.append(told[tree][name])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {name: pair for name, pair in sorted(pairs.items()) if all(pair.here) and all(pair.there)}


def compiled(tree: Path) -> None:
    """A tree whose modules are compiled at each start loses a fifth of it, and a shell may forbid to keep
    what was compiled (PYTHONDONTWRITEBYTECODE): both have it from now on.
    """
    argv = [str(tree / ".venv/bin/python"), "-m", "compileall", "-q", "-x", r"/\.venv/", str(tree)]
    with suppress(OSError):  # no interpreter there: `measure` says so
        subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def measure(tree: Path, figure: str) -> dict[str, float]:
    """Contender -> p50 of one quick run of `figure` in `tree`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        file = Path(scratch) / "told.json"
        argv = [str(tree / ".venv/bin/python"), "-m", "bench", "--quick", "--only", figure]
        try:
            ran = subprocess.run(
                [*argv, "--json", str(file)], cwd=tree, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise CannotMeasureError(f"{tree}: {error.strerror}: {argv[0]}: make venv-bench there") from None
        if ran.returncode not in EXITS or not file.exists():
            last = ran.stderr.strip().rpartition("\n")[2]
            raise CannotMeasureError(f"{tree}: {figure}: exit status {ran.returncode}: {last}")
        told = json.loads(file.read_text(encoding="utf-8"))
    return {name: median(one["p50"] for one in samples) for name, samples in told["contenders"].items()}


def as_text(pairs: dict[str, Pair]) -> str:
    width = max(map(len, pairs), default=0)
    lines = [f"{'':{width}}  {'there':>12} {'here':>12}  ratio   min - max"]
    for name, pair in pairs.items():
        ratios = pair.ratios()
        lines.append(
            f"{name:{width}}  {median(pair.there):12.0f} {median(pair.here):12.0f}  "
            f"{median(ratios):5.3f}   {min(ratios):.3f} - {max(ratios):.3f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
