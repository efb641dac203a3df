"""What was tried, and what came of it: a file of JSON lines, so that a sweep goes on where it was left.

It holds for one state of the code: what other code answered is not worth keeping.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
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
        for line in self._whole_lines(path):
            if "code" in line:
                if line["code"] != code:
                    raise OtherCode(f"{path} is of other code: remove it, or give another --record")
                continue
            fault = FAULTS[line["kind"]]
            blow = Blow(line["story"], line["process"], fault, line["n"], line["errno"])
            self.tried[blow] = Aftermath(line["call"], How(line["how"]), line["why"])

    @staticmethod
    def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
        """The last may be half a line: we were killed."""
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        yield from map(json.loads, whole.splitlines())

    def add(self, blow: Blow, outcome: Aftermath) -> None:
        self.tried[blow] = outcome
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_dict(blow, outcome)) + "\n")


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
