"""What a run prints, the JSON it leaves behind, and the exit status that CI sees."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from bench.harness import FOREIGN_MAX, SEED, Contender, Result, Run, Unit, Verdict

COSTS, RATIOS = ("p50", "p99"), ("ratio", "min - max", "wanted")
HEAD = ("figure", "ours", *COSTS, "rival or limit", *COSTS, *RATIOS, "verdict")
NUMBERS = {column for column, word in enumerate(HEAD) if word in {*COSTS, *RATIOS}}

EXIT_OK, EXIT_MISSED, EXIT_NOT_MEASURED = 0, 1, 3

SCALES = {
    Unit.NS: ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1, "ns")),
    Unit.BYTES: ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")),
}


def exit_status(results: Sequence[Result]) -> int:
    """A missed ratio weighs more than a gap; a gap is no pass."""
    verdicts = {result.verdict for result in results}
    if Verdict.MISSED in verdicts:
        return EXIT_MISSED
    return EXIT_NOT_MEASURED if Verdict.NOT_MEASURED in verdicts else EXIT_OK


def as_text(run: Run, results: Sequence[Result]) -> str:
    lines = _aligned([HEAD, *(_cells(run, result) for result in results)])
    gaps = [f"not measured: {name}: {why}" for name, why in run.missing.items()]
    return "\n".join([*lines, "", *_breakdowns(run, results), *gaps, *_footer(run)]) + "\n"


def as_json(run: Run, results: Sequence[Result]) -> dict[str, object]:
    return {
        "host": {
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "core": run.core,
        },
        "rounds": run.bench.rounds,
        "samples": run.bench.samples,
        "seed": SEED,
        "foreign": run.foreign,
        "rows": [
            {
                "figure": result.figure.name,
                "title": result.figure.title,
                "ours": result.row.ours.name,
                "limit": result.row.limit.name,
                "unit": result.row.ours.unit.value,
                "wanted": str(result.row.wanted),
                "verdict": result.verdict.value,
                "ratio": result.ratio if result.ratios else None,
                "ratios": result.ratios,
                "why": result.why,
            }
            for result in results
        ],
        "contenders": {
            name: [{"p50": one.p50, "p99": one.p99, "parts": dict(one.parts)} for one in samples]
            for name, samples in sorted(run.samples.items())
        },
    }


def _cells(run: Run, result: Result) -> tuple[str, ...]:
    row = result.row
    ratio = f"{result.ratio:.2f}" if result.ratios else "-"
    spread = f"{min(result.ratios):.2f} - {max(result.ratios):.2f}" if result.ratios else "-"
    return (
        result.figure.name,
        row.ours.name,
        *_costs(run, row.ours),
        row.limit.name,
        *_costs(run, row.limit),
        ratio,
        spread,
        str(row.wanted),
        result.verdict.value,
    )


def _costs(run: Run, contender: Contender) -> tuple[str, str]:
    if contender.name in run.missing:
        return "-", "-"
    typical = run.typical(contender)
    return amount(typical.p50, contender.unit), amount(typical.p99, contender.unit)


def amount(value: float, unit: Unit) -> str:
    for scale, word in SCALES[unit]:
        if value >= scale:
            return f"{value / scale:.3g} {word}"
    return f"{value:.3g} {unit.value}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _breakdowns(run: Run, results: Sequence[Result]) -> list[str]:
    """Where the time goes, for contenders that told; shares are of their p50."""
    lines = []
    for contender in {result.row.ours.name: result.row.ours for result in results}.values():
        if contender.name in run.missing:
            continue
        typical = run.typical(contender)
        if typical.parts:
            lines.append(f"{contender.name}: {amount(typical.p50, contender.unit)}, of which")
            lines += [
                f"  {amount(cost, contender.unit):>8}  {cost / typical.p50:4.0%}  {part}"
                for part, cost in typical.parts.items()
            ]
    return lines


def _footer(run: Run) -> list[str]:
    where = f"{run.bench.rounds} interleaved rounds, seed {SEED}, pinned contenders on core {run.core}"
    lines = [
        f"{where}; p50 and p99 are medians over rounds.",
        "A ratio is the median of those of each round: '<=' wants ours / limit, '>=' wants rival / ours.",
        f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}.",
    ]
    disturbed = sum(share > FOREIGN_MAX for share in run.foreign)
    if disturbed:
        much, worst = f"{FOREIGN_MAX:.0%}", f"{max(run.foreign):.0%}"
        lines.append(
            f"{disturbed} of {len(run.foreign)} measurements lost more than {much} of their core to foreign "
            f"work (worst {worst}): run again on a calmer machine."
        )
    return lines
