"""Which tests notice a planted bug: each runs with it on, in a process of its own, and who fails is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from qemu_shim.study.campaign.code import product_version
from simulator.planted.registry import PLANTED

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "build" / "planted.json"
KILLERS = Path(__file__).with_name("killers.json")
TEST_TIMEOUT_S = 60


class Outcomes:
    """A pytest plugin: which tests failed, of how many."""

    def __init__(self) -> None:
        self.failed: dict[str, float] = {}
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed:
            self.failed.setdefault(report.nodeid, round(report.duration, 3))


@dataclass(frozen=True, slots=True)
class Run:
    """One plant over one path of tests; `failed` tests, with the seconds each took."""

    version: str
    ran: int
    failed: dict[str, float]
    seconds: float
    status: int


def outcomes(arguments: list[str], into: Path) -> int:
    """Run pytest here, and write what failed; also if it ends in an error, as of what a mistake left open."""
    os.environ["PYTEST_TIMEOUT"] = str(TEST_TIMEOUT_S)  # some mistakes wait for ever
    plugin = Outcomes()
    try:
        status = pytest.main([*arguments, "-q", "--tb=no", "-p", "no:cacheprovider"], plugins=[plugin])
    finally:
        into.write_text(json.dumps({"ran": plugin.ran, "failed": plugin.failed}), encoding="utf-8")
    return int(status)


def run(plant: str, path: str) -> Run:
    with tempfile.TemporaryDirectory() as made:
        into = Path(made) / "outcomes.json"
        argv = [sys.executable, "-m", "tests.planted", "--here", str(into), plant, "--in", path]
        began = time.monotonic()
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        seen = json.loads(into.read_text(encoding="utf-8")) if into.exists() else {"ran": 0, "failed": {}}
        return Run(
            product_version(), seconds=round(time.monotonic() - began, 1), status=done.returncode, **seen
        )


# -- the record ----------------------------------------------------------------------------------------

Record = dict[str, dict[str, dict[str, object]]]


def read_record() -> Record:
    try:
        found: Record = json.loads(RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {}
    return found


def sweep(plants: Iterable[str], paths: list[str], *, again: bool) -> Iterator[tuple[str, str, Run, bool]]:
    """Each with each, what is on record for this version of the product not anew: `True` says it was run."""
    for plant in plants:
        for path in paths:
            kept = read_record().get(plant, {}).get(path)
            if kept is not None and kept["version"] == product_version() and not again:
                yield plant, path, Run(**kept), False  # type: ignore[arg-type]  # as it was written
                continue
            made = run(plant, path)
            record = read_record()
            record.setdefault(plant, {})[path] = asdict(made)
            RECORD.parent.mkdir(exist_ok=True)
            RECORD.write_text(json.dumps(record, indent=1), encoding="utf-8")
            yield plant, path, made, True


# -- killers -------------------------------------------------------------------------------------------


def killers() -> Mapping[str, list[str]]:
    """Of each plant the tests that fail with it on; the first is the one the registry's test runs."""
    found: Mapping[str, list[str]] = json.loads(KILLERS.read_text(encoding="utf-8"))
    return found


def known(plant: str, test: str) -> bool:
    """A killer without parameters stands for all of its function."""
    named = killers().get(plant, [])
    return test in named or test.partition("[")[0] in named


def write_killers() -> None:
    """Add who failed in the record: the quickest test first, then whole functions."""
    all_of, record = dict(killers()), read_record()
    for plant in PLANTED:
        failed: dict[str, float] = {}
        for kept in record.get(plant, {}).values():
            failed |= Run(**kept).failed  # type: ignore[arg-type]
        first = all_of.get(plant, [])[:1] or sorted(failed, key=failed.__getitem__)[:1]
        functions = {test.partition("[")[0] for test in [*failed, *all_of.get(plant, [])[1:]]}
        if first:
            all_of[plant] = [*first, *sorted(functions - {first[0]})]
    KILLERS.write_text(
        json.dumps({plant: all_of[plant] for plant in PLANTED if plant in all_of}, indent=1) + "\n",
        encoding="utf-8",
    )
