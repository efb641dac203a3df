"""Who is cheaper than whom in one workload, and who takes no part in that.

A model whose constants are known to a factor says nothing of a few per cent: times that differ by less than
TIE are a tie, everywhere the same.  And only who did the same work can be ranked, which is more than bytes:
who refused what the workload is about (to give pages back, to have them collapsed) was cheap for that reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qemu_shim.study.compare.schema import DesignFigures, Work

TIE = 0.05  # of the cheaper one
# What every design does alike.
SAME = (
    "cpu_bytes",
    "cpu_pages",
    "dma_bytes",
    "dma_pages",
    "work_descriptors",
)


def tie(cheaper_us: float, dearer_us: float) -> bool:
    return dearer_us < cheaper_us * (1 + TIE)


def tiers(us: Mapping[str, float]) -> list[list[str]]:
    """The designs, cheapest first; those that tie with the first of them stand together."""
    found: list[list[str]] = []
    for name in sorted(us, key=lambda name: us[name]):
        if found and tie(us[found[-1][0]], us[name]):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def unranked(designs: Sequence[DesignFigures]) -> dict[str, str]:
    """Design -> why it is in no ranking."""
    why = {it.design: reason for it in designs if (reason := _own_reason(it))}
    same = Counter(_work(it.work) for it in designs if it.design not in why)
    usual = dict(same.most_common(1)[0][0]) if same else {}
    for it in designs:
        other = [name for name, number in _work(it.work) if number != usual.get(name)]
        if it.design not in why and other:
            told = ", ".join(f"{name} {getattr(it.work, name):,} for {usual[name]:,}" for name in other)
            why[it.design] = f"it did other work and refused nothing: {told}"
    return why


def undeclared(designs: Sequence[DesignFigures], why: Mapping[str, str]) -> list[str]:
    """Who did something else and did not say so, which is nobody unless there is a bug."""
    return [it.design for it in designs if it.design in why and not it.refusals]


def _own_reason(it: DesignFigures) -> str:
    if it.problems:
        return "it failed"
    if not it.series.step:
        return "it did not start"
    refused = ", ".join(dict.fromkeys(refusal.what for refusal in it.refusals))
    return f"it refused: {refused}" if refused else ""


def _work(work: Work) -> tuple[tuple[str, int], ...]:
    return tuple((name, getattr(work, name)) for name in SAME)
