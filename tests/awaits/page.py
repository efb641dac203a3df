"""docs/awaits.md: every sleep of the cores that carries something, as the comments beside them say it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby

from tests.awaits.sites import Site, cores, idle_comments, sites
from tests.awaits.values import Values
from tests.tidy.source import ROOT, product

BAR = "\\|"  # in a cell
DOCUMENT = ROOT / "docs" / "awaits.md"
HEAD = """# Who sleeps must look again

Generated from the comments beside the awaits of the cores (`python -m tests.awaits --write`); a tidy test
finds the awaits in the syntax tree and holds comments and page to them. A flow that awaits lets everybody
else run: what it read before may have changed after. Each row is an await across which something is carried
that could have: what may be lost, where it is asked again and the test that makes the change just there, or
why it cannot change. `asked`: a question that could have ended the function; `each x`: what a loop goes over.
"""


@cache
def found() -> tuple[Site, ...]:
    return tuple(sites(cores(), Values(product())))


def complaints() -> list[str]:
    said = [complaint for site in found() for complaint in site.complaints]
    idle = [
        complaint
        for module in cores()
        for complaint in idle_comments(module, [site for site in found() if site.module is module])
    ]
    return said + idle


def document() -> str:
    return "\n".join([HEAD, *_tables()])


def _tables() -> Iterator[str]:
    counts = f"{len(found())} awaits in {len({site.module.path for site in found()})} files."
    yield counts + "\n"
    for path, of_file in groupby(found(), key=lambda site: str(site.module.path)):
        yield f"## {path}\n"
        yield "| Function | Await | Carried | What may be lost | Asked again, or why not | Test |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for site in of_file:
            yield from _rows(site)
        yield ""


def _rows(site: Site) -> Iterator[str]:
    for clause in site.clauses:
        names = [name for name in clause.names if name in site.carried]
        if not names:
            continue
        lost, again = (clause.what, clause.where) if clause.tests else ("", f"cannot change: {clause.what}")
        cells = (
            f"`{site.function}`",
            f"`{site.source}`",
            ", ".join(names),
            lost,
            again,
            ", ".join(f"`{test}`" for test in clause.tests),
        )
        yield f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"
