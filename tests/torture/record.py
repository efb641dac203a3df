"""What was tried, and what came of it: a file of JSON lines, so that a sweep goes on where it was left.

It holds for one state of the code: what other code answered is not worth keeping.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.torture.blow import Aftermath, Blow, How
from tests.torture.calls import FAULTS
from tests.torture.daemons import ROOT

PACKAGES = ("protocol", "kvmd", "iommufdd", "device_sim", "qemu_shim", "tests/torture")


class OtherCode(Exception):
    """The record is of another state of the code."""


def state_of_code() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def as_dict(blow: Blow, outcome: Aftermath) -> dict[str, Any]:
    return {
        "story": blow.story,
        "process": blow.victim,
        "kind": blow.fault.kind,
        "n": blow.at,
        "errno": blow.errno_index,
        "call": outcome.call,
        "how": outcome.how.value,
        "why": outcome.why,
    }


class TriedBlows:
    """`path` None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """OtherCode."""
        self._path = path
        self.tried: dict[Blow, Aftermath] = {}
        code = state_of_code()
        if path is None:
            return
        if not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps({"code": code}) + "\n", encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # we were killed within a line
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        recorded, self.tried = read(path)
        if recorded != code:
            raise OtherCode(f"{path} is of other code: remove it, or give another --record")

    def add(self, blow: Blow, outcome: Aftermath) -> None:
        self.tried[blow] = outcome
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_dict(blow, outcome)) + "\n")


def read(path: Path) -> tuple[str, dict[Blow, Aftermath]]:
    """The state of the code it is of, and what it has."""
    text = path.read_text(encoding="utf-8")
    first, *lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    tried = {}
    for line in lines:
        blow = Blow(line["story"], line["process"], FAULTS[line["kind"]], line["n"], line["errno"])
        tried[blow] = Aftermath(line["call"], How(line["how"]), line["why"])
    return first["code"], tried


def table(tried: dict[Blow, Aftermath]) -> str:
    """A row for each process and kind; blows that met nobody are no tries."""
    rows: dict[tuple[str, str], Counter[How]] = {}
    for blow, outcome in tried.items():
        if outcome.call is not None or outcome.how is How.FAILED:
            rows.setdefault((blow.victim, blow.fault.kind), Counter())[outcome.how] += 1
    columns = ("tried", *(how.value for how in How))
    lines = [f"{'process':<11} {'kind':<12}" + "".join(f"{name:>10}" for name in columns)]
    for (victim, kind), counts in [*rows.items(), (("all", ""), sum(rows.values(), Counter[How]()))]:
        numbers = [counts.total(), *(counts[how] for how in How)]
        lines.append(f"{victim:<11} {kind:<12}" + "".join(f"{number:>10}" for number in numbers))
    return "\n".join(lines)
