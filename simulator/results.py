"""docs/results/simulator.md, from the records beside it: `python -m simulator.results --write`.

Each record is a JSON file that one command makes (RECORDS); what is said of it here is worked out from it,
and a test holds the page to the records.  A section whose record is not there says which command makes it.

    planted.json      simulator/planted/hunt.py: by "plant/strategy/range" what was found, and seconds
    others.json       the same, by stories that were not written for it
    exhaustive.json   simulator/exhausted.py: searches, and what they are of
    torture.json      tests/torture/summary.py: blows at real processes, and what came of them
    speed.json        `python -m bench`: what a schedule takes
    found.toml        by hand: what was wrong with our own code, and which test keeps it right
    clean.json        simulator/rows.py: what schedules with nothing planted came to
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from qemu_shim.vmm.designs import DESIGNS
from simulator.faults.kinds import ALL, drawn_among
from simulator.planted.hunt import Hunted, hunted, of_json
from simulator.planted.registry import PLANTED
from simulator.search.distinct import KEPT
from simulator.search.strategies import DEFAULT

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = RESULTS / "simulator.md"
PAGE_COLUMNS = 110
STORIES_SHOWN = 3  # of each planted mistake
RECORDS = {
    "planted": "python -m simulator.hunting --record docs/results/planted.json",
    "others": "python -m simulator.hunting --others --record docs/results/others.json",
    "exhaustive": "python -m simulator.exhausted",
    "torture": "make torture",
    "clean": "python -m simulator.clean",
    "speed": "python -m bench --only schedules --json docs/results/speed.json",
}
FOUND = "found"
Records = Mapping[str, Any]


def records(directory: Path = RESULTS) -> Records:
    """Those that are there, by name."""
    paths = {name: directory / f"{name}.json" for name in RECORDS}
    kept = {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()
    }
    return {**kept, FOUND: tomllib.loads((RESULTS / "found.toml").read_text(encoding="utf-8"))}


def page(kept: Records) -> str:
    sections = [_HEAD, _COVERED]
    for title, name, section in _SECTIONS:
        sections.append(f"## {title}")
        sections += section(kept[name]) if name in kept else [f"Not on record yet: `{RECORDS[name]}`."]
    return "\n\n".join(map(_wrapped, [*sections, *_answer(kept), _LEFT_OUT])) + "\n"


def _wrapped(section: str) -> str:
    """A paragraph is; headings, tables and lists are as they stand."""
    if section.startswith(("#", "|")):
        return section
    return fill(section, PAGE_COLUMNS, break_long_words=False, break_on_hyphens=False)


_HEAD = """# What the simulator came to

Generated (`python -m simulator.results --write`) from the records beside this page; a test holds the one to
the others. How a schedule is chosen and judged is in [0024](../decisions/0024-a-world-of-greenlets.md),
[0026](../decisions/0026-the-ghost-history.md) and [0027](../decisions/0027-how-schedules-are-chosen.md);
[the tour](../tour.md) says how to do it yourself."""

_COVERED = """## What is covered

The unchanged daemons and a VMM in one process, on a kernel in memory, where each message, each kick and each
load and store of tables, queues and registers is a step that somebody else's may come before. The stories are
in `simulator/stories/`, each on every design that can play it; `qemu-shim list --planted` says which mistakes
can be put in, and [invariants.md](../invariants.md) by which checkers they are to be found."""


def _of_planted(record: Mapping[str, Any]) -> Iterator[str]:
    """How long each was sought goes by the strategy: that one found more may be due to that."""
    hunts = _grouped_hunts(record)
    found = [each for of_it in hunts.values() for each in of_it]
    possible = sum(plant.simulated for plant in PLANTED.values())
    sought = {each.plant.id: False for each in found}
    sought |= {each.plant.id: True for each in found if each.is_ever_right}
    never = [f"`{name}`" for name, is_found in sought.items() if not is_found]
    yield (
        f"Of {possible} mistakes that a story may come to, {len(sought)} were sought, and"
        f" {sum(sought.values())} were found by some strategy in some range, by an invariant that they belong"
        f" to{'; in none: ' if never else ''}{', '.join(never)}."
    )
    for strategy, of_it in hunts.items():
        right = sum(each.is_right for each in of_it)
        others = sum(each.is_met_by_others for each in of_it)
        half = sum(not each.is_right and each.schedules is not None for each in of_it)
        yield (
            f"By `{strategy}`: {len(of_it)} were sought"
            f" ({_effort(of_it)}); {right} were found in every range by an invariant that they belong to,"
            f" {others} of these by a story that was not written for them, and {half} more in half of the"
            " ranges or more."
        )
    hours = sum(each.seconds for each in found) / 3600
    yield (
        "By each strategy: after how many schedules, the median over all ranges, of which those that found"
        " nothing come last; `!`: found in so many of them only, or by another invariant. Strategies whose"
        " bounds or states of the code differ are not compared by these counts, and all ask stories and"
        " designs in one order: where any schedule of a story shows a mistake, the count is that story's"
        " place. Answers: that are not the default, in the story it was shrunk to; 0: it needs none. Stories:"
        f" most often those, by `{next(iter(hunts), DEFAULT)}`; `*`: written for it. All took {hours:.1f}"
        " hours of one core."
    )
    of_plants = _by_plant(found)
    yield _table(
        ("mistake", "found by", "answers", *hunts, "stories"),
        [
            (
                *(f"`{plant}`", *_found(list(of_it.values()))),
                *(_of_ranges(of_it.get(strategy)) for strategy in hunts),
                _stories(next(iter(of_it.values()))),
            )
            for plant, of_it in of_plants.items()
        ],
    )


def _of_others(record: Mapping[str, Any]) -> Iterator[str]:
    """A mistake's own stories are left out, so that nobody put it where it is found."""
    for strategy, of_it in _grouped_hunts(record).items():
        right = [each for each in of_it if each.is_right]
        yield (
            f"By `{strategy}`, and by no story that was written for it: of {len(of_it)} mistakes that were"
            f" sought ({_effort(of_it)}) {len(right)} were found in every range by an invariant that they"
            " belong to; the others not, or by another invariant."
        )
        yield ", ".join(f"`{each.plant.id}`" for each in of_it if not each.is_right) or "All were."


def _grouped_hunts(record: Mapping[str, Any]) -> Mapping[str, Sequence[Hunted]]:
    """By strategy."""
    found = [each for each in hunted(of_json(record)) if each.plant.simulated]
    strategies = sorted({each.strategy for each in found}, key=lambda name: (name != DEFAULT, name))
    return {strategy: [each for each in found if each.strategy == strategy] for strategy in strategies}


def _effort(of_it: Sequence[Hunted]) -> str:
    """A range that ended with a catch had a bound as well."""
    ranges = _from_to([len(each.ends) for each in of_it])
    ends = [end for each in of_it for end in each.ends]
    states = len({end.code for end in ends})
    bounds = _from_to([end.most for end in ends])
    return f"ranges of seeds: {ranges} each, of at most {bounds} schedules; states of the code: {states}"


def _from_to(counts: Sequence[int]) -> str:
    if not counts:
        return "no"
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _by_plant(found: Sequence[Hunted]) -> Mapping[str, Mapping[str, Hunted]]:
    """As they are listed, of each strategy what it came to."""
    of_plants: dict[str, dict[str, Hunted]] = {name: {} for name in PLANTED}
    for each in found:
        of_plants[each.plant.id][each.strategy] = each
    return {plant: of_it for plant, of_it in of_plants.items() if of_it}


def _found(of_it: Sequence[Hunted]) -> tuple[str, str]:
    """By which invariants, most often the first, and with how few answers."""
    by = sum((each.invariants for each in of_it), Counter[str]())
    steps = [each.steps for each in of_it if each.steps is not None]
    return ", ".join(name for name, _ in by.most_common()) or "-", _number(min(steps, default=None))


def _of_ranges(each: Hunted | None) -> str:
    if each is None:
        return "not sought"
    schedules = _number(each.schedules)
    return schedules if each.is_right else f"{schedules} ! {len(each.found)}/{len(each.ends)}"


def _stories(each: Hunted) -> str:
    return ", ".join(name for name, _ in each.stories.most_common(STORIES_SHOWN)) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _of_exhaustive(record: Mapping[str, Any]) -> Iterator[str]:
    searches: _Rows = record["searches"]
    for (design, *_), of_it in _grouped(searches, "design"):
        without = [each for each in of_it if not each["faults"]]
        faulted = [each for each in of_it if each["faults"]]
        met = [each for each in faulted if each["faulted"]]
        yield (
            f"On `{design}` {_ended(without)} of {len(without)} searches without faults ended:"
            f" {_sum(without, 'interleavings'):,} interleavings, of which {_sum(without, 'failed'):,} failed."
            f" With faults the same come again, and are not added up: {_ended(met)} of {len(met)} searches"
            f" ended, {_sum(faulted, 'failed'):,} interleavings failed; {len(faulted) - len(met)} more came"
            " to no fault, and so to the same once more."
        )
    yield (
        f"States of the code: {len({each['code'] for each in searches})}. Nodes are of the"
        " tree that all runs make, those that were pruned as well: as many as there are steps in it, and 1."
    )
    head = ("story", "design", "faults", "interleavings", "with a fault", "pruned", "nodes", "left", "failed")
    yield _table(
        head,
        [
            (
                *(f"`{each['story']}`", f"`{each['design']}`", drawn_among(each["faults"]) or "none"),
                f"{'all ' if each['ended'] else ''}{each['interleavings']:,}",
                *(f"{each[of]:,}" for of in ("faulted", "pruned", "states")),
                "none" if each["ended"] else f"at least {each['left']:,}",
                f"{each['failed']:,}",
            )
            for each in searches
        ],
    )
    if plants := record.get("plants"):
        yield "With a mistake planted, the first run that shows it is, of those sought in these searches:"
        yield _table(
            ("mistake", "story", "design", "faults", "found by", "run"),
            [
                (
                    *(f"`{each[name]}`" for name in ("plant", "story", "design")),
                    *(drawn_among(each["faults"]) or "none", each["invariant"], each["run"]),
                )
                for each in plants
            ],
        )


def _ended(searches: _Rows) -> int:
    return sum(each["ended"] for each in searches)


def _of_torture(record: Mapping[str, Any]) -> Iterator[str]:
    rows, there_are = record["sweeps"], record["sweeps_there_are"]
    survived, refused = (sum(row[how] for row in rows) for how in ("survived", "refused"))
    failed, ended = (sum(map(len, (row["failed"] for row in rows))), sum(row["ended"] for row in rows))
    states = len({row["code"] for row in rows})
    yield (
        f"{survived + refused + failed:,} blows at real processes: {survived:,} survived, {refused:,} refused"
        f" with a reason, {failed:,} still not survived. A sweep is a story, a process, and what is done to"
        f" it at its n-th call: of {there_are} {ended} went on until a run met nothing, {len(rows) - ended}"
        f" were broken off and {there_are - len(rows)} not begun. Code: of {states} state(s)."
    )
    blows: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for row in rows:
        blows[row["kind"]] += row["survived"] + row["refused"] + len(row["failed"])
        ends[row["kind"]] += row["ended"]
    yield _table(
        ("what was done", "blows", "sweeps that ended"),
        [(f"`{kind}`", f"{count:,}", ends[kind]) for kind, count in sorted(blows.items())],
    )


def _of_finds(record: Mapping[str, Any]) -> Iterator[str]:
    yield f"{len(record['found'])} faults of ours, each with the test that fails if it comes back:"
    yield _table(
        ("what was wrong", "by", "held by"),
        [(each["what"], f"`{each['by']}`", f"`{each['test']}`") for each in record["found"]],
    )


def _of_speed(record: Mapping[str, Any]) -> Iterator[str]:
    host = record["host"]
    yield (
        f"One fault and one invalidation under a random schedule, each load and store of a table, queue or"
        f" register a point, judged and recorded, on one core ({host['machine']}, CPython {host['python']}):"
    )
    rows = [
        (row["ours"], *map(_a_second, row_figures(record, row)), row["verdict"]) for row in record["rows"]
    ]
    yield _table(("what", "schedules a second", "wanted", "verdict"), rows)


def row_figures(record: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float]:
    """Nanoseconds of one schedule, the median of the samples, and at most."""
    ours, limit = (median(one["p50"] for one in record["contenders"][row[key]]) for key in ("ours", "limit"))
    return ours, limit


def _a_second(nanoseconds: float) -> str:
    return f"{1e9 / nanoseconds:.0f}"


def _of_clean(record: Mapping[str, Any]) -> Iterator[str]:
    stories, whole = ([row for row in record["rows"] if row["whole"] is kind] for kind in (False, True))
    codes, strategies = ({row[what] for row in record["rows"]} for what in ("code", "strategy"))
    yield (
        f"{_sum(stories, 'schedules'):,} schedules of small stories (distinct by trace:"
        f" {_told(stories, 'traces')}), and {_sum(whole, 'schedules'):,} of whole scenarios and workloads:"
        f" {_sum(record['rows'], 'failed'):,} failed. Chosen by {', '.join(sorted(strategies))}; of"
        f" {len(codes)} states of the code. Distinct is counted for each story, design, strategy, state of"
        f" the code and kinds of faults, and estimated from {KEPT} on (`simulator/search/distinct.py`); rows"
        " of before c694879 do not say, for one order of accesses had several numbers there."
    )
    yield _table(
        ("design", "faults", "stories", "schedules", "with a fault", "distinct", "failed"),
        [
            (
                f"`{design}`",
                "all kinds" if faults == ALL else faults or "none",
                *(len({row["name"] for row in rows}), f"{_sum(rows, 'schedules'):,}"),
                *(_told(rows, "faulted"), _told(rows, "traces"), f"{_sum(rows, 'failed'):,}"),
            )
            for (design, faults), rows in _grouped(stories, "design", "faults")
        ],
    )
    if failures := [(row["code"], f"`{line}`") for row in record["rows"] for line in row["repeats"]]:
        yield _table(("code", "failed, and how to repeat it"), failures)
    if errors := [
        (row["code"], f"`{row['name']}`", f"`{row['design']}`", row["faults"] or "none", line)
        for row in record["rows"]
        for line in row.get("errors", ())
    ]:
        yield f"{len(errors)} shards are not counted, for an error of ours ended them:"
        yield _table(("code", "of", "design", "faults", "which, and by what"), errors)
    if whole:
        yield _table(
            ("scenario or workload", "design", "seeds", "schedules", "failed"),
            [
                (f"`{name}`", f"`{design}`", f"{_seeds(rows):,}", *_sums(rows, ("schedules", "failed")))
                for (name, design), rows in _grouped(whole, "name", "design")
            ],
        )


_Rows = Sequence[Mapping[str, Any]]


def _grouped(rows: _Rows, *by: str) -> list[tuple[tuple[str, ...], _Rows]]:
    """By what these are, designs in their order."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: list(DESIGNS).index(row["design"])):
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return list(groups.items())


def _sum(rows: _Rows, what: str) -> int:
    return sum(row[what] for row in rows)


def _sums(rows: _Rows, counts: Sequence[str]) -> list[str]:
    return [f"{_sum(rows, what):,}" for what in counts]


def _told(rows: _Rows, what: str) -> str:
    """Older rows do not say."""
    known = [row[what] for row in rows if what in row]
    if not known:
        return "not counted"
    return f"{'' if len(known) == len(rows) else 'at least '}{sum(known):,}"


def _seeds(rows: _Rows) -> int:
    return sum(behind - first for first, behind in (row["seeds"] for row in rows))


_SECTIONS = (
    ("Planted mistakes, by strategy", "planted", _of_planted),
    ("Planted mistakes, by stories not written for them", "others", _of_others),
    ("With nothing planted", "clean", _of_clean),
    ("Every interleaving, by design", "exhaustive", _of_exhaustive),
    ("Faults in real processes", "torture", _of_torture),
    ("What they found in our own code", FOUND, _of_finds),
    ("How fast", "speed", _of_speed),
)


def _answer(kept: Records) -> Iterator[str]:
    """No more than the records bear out."""
    yield "## Is it safe?"
    searches = kept.get("exhaustive", {}).get("searches", [])
    clean = kept.get("clean", {}).get("rows", [])
    bad = sum(each["failed"] for each in (*searches, *clean))
    if not searches and not clean:
        yield "That these records do not say yet."
    elif bad:
        yield f"As modelled here, no: {bad:,} interleavings failed."
    else:
        ended = [each for each in searches if each["ended"] and not each["faults"]]
        struck = [each for each in searches if each["ended"] and each["faulted"]]
        of_shared = sum(each["design"] == "shared" for each in ended)
        yield (
            f"As modelled here, nothing was found that makes it unsafe: in {of_shared} searches of"
            f" the shared table that ended, {len(ended) - of_shared} of the other designs, and {len(struck)}"
            " with faults, no interleaving lets a device reach memory that is not its VM's, or loses a store."
        )
        shown = {each["plant"] for each in kept.get("exhaustive", {}).get("plants", [])}
        yield (
            f"What that is worth: of planted mistakes {len(shown)} are on record as sought and found by such"
            " searches. What schedules by chance found is of more stories than these, and with faults: of the"
            " others it is not known whether such a search would have seen them."
        )


_LEFT_OUT = """## What it does not cover

- The daemons are a model: an interleaving of theirs is one of Linux' as far as their steps are Linux' steps
  (`docs/decisions/0008-departures.md` lists where they are not). Nothing here has looked at kernel code.
- A story is about few pages, devices and vCPUs. What needs more of them is met by scenarios only, whose
  interleavings are drawn and not enumerated.
- Memory is as x86 orders it, less what a store buffer may hold back; other machines are not modelled.
- Nested translation is left out, as the series leaves it out."""


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv: Sequence[str]) -> int:
    if list(argv) != ["--write"]:
        print("usage: python -m simulator.results --write", file=sys.stderr)
        return 2
    PAGE.write_text(page(records()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
