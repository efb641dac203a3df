"""docs/results/performance.md, from what a run left and what is said of it: `python -m bench.page`.

    bench.json    `python -m bench --json`: figures, each beside its limit, of one run
    tried.toml    by hand: what was tried for a figure, what it gave, and why a row that falls short does

A test holds the page to both, and each row that falls short to a reason (tests/tidy/test_performance.py).
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from bench.harness import Unit, Verdict
from bench.report import amount

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE, RUN, TRIED = (RESULTS / name for name in ("performance.md", "bench.json", "tried.toml"))
COLUMNS = 110
Told = Mapping[str, Any]

_HEAD = """# How fast it is, beside what the machine allows

Generated (`python -m bench.page`) from [bench.json](bench.json) and [tried.toml](tried.toml). Another
machine takes other times; a ratio carries over, for both sides of it were measured in one run, in turns: of a
limit from elsewhere it does not."""


def told() -> tuple[Told, Told]:
    """The run, and what is said of it."""
    return json.loads(RUN.read_text(encoding="utf-8")), tomllib.loads(TRIED.read_text(encoding="utf-8"))


def page(run: Told, tried: Told) -> str:
    host = run["host"]
    sections = [_HEAD]
    for figure, title in {row["figure"]: row["title"] for row in run["rows"]}.items():
        rows = [row for row in run["rows"] if row["figure"] == figure]
        sections.append(f"## {figure}: {title}")
        sections.append(
            f"`python -m bench --only {figure}`: {run['rounds']} rounds, CPython {host['python']}, core"
            f" {host['core']} of {host['cores']}."
        )
        sections.append("\n".join(_table(run, rows)))
        sections += [f"- **{name}** falls short: {tried['short'][name]}." for name in short(rows)]
        sections += [f"Not measured: {', '.join(names)}: {why}." for why, names in _gaps(rows).items()]
        sections += [
            f"Tried: {each['what']}. {each['gave']}." for each in tried["tried"] if each["figure"] == figure
        ]
    return "\n\n".join(map(_wrapped, sections)) + "\n"


def short(rows: Sequence[Told]) -> list[str]:
    """What is not as wanted, beside something."""
    return list(dict.fromkeys(row["ours"] for row in rows if row["verdict"] == Verdict.MISSED.value))


def _gaps(rows: Sequence[Told]) -> Mapping[str, list[str]]:
    """What there was nothing to hold against, by why."""
    gaps = defaultdict[str, list[str]](list)
    for row in rows:
        if row["verdict"] == Verdict.NOT_MEASURED.value:
            gaps[row["why"].removeprefix(f"{row['limit']}: ")].append(row["limit"])
    return gaps


def _table(run: Told, rows: Sequence[Told]) -> Iterator[str]:
    yield "| ours | p50 | beside | p50 | ratio (min - max) | wanted | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        ratios = row["ratios"]
        spread = f"{row['ratio']:.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else "-"
        costs = [_cost(run, row, side) for side in ("ours", "limit")]
        cells = row["ours"], costs[0], row["limit"], costs[1], spread, row["wanted"], row["verdict"]
        yield f"| {' | '.join(cells)} |"


def _cost(run: Told, row: Told, side: str) -> str:
    samples = run["contenders"].get(row[side])
    return amount(median(one["p50"] for one in samples), Unit(row["unit"])) if samples else "-"


def _wrapped(section: str) -> str:
    if section.startswith(("#", "|")):
        return section
    indent = "  " if section.startswith("- ") else ""
    return fill(section, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(*told()), encoding="utf-8")
