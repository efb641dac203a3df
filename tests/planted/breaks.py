"""How many tests each planted bug breaks, of some drawn by lot: one that many notice is too coarse a mistake.

`python -m tests.planted.breaks [ID...] [--in PATH...]` collects once, runs all of it in a fork in which each
function that a plant changes says when it was there, and then in a fork for each plant at most MOST of the
tests that came to its functions.  Tests whose bodies are in Pythons of their own are not seen.  What comes of
it is in breaks.json (or FILE); plants that are on record there are passed by unless they are named.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sys
import tempfile
import textwrap
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from _pytest.main import pytest_runtestloop as run_all

from simulator.planted.plant import Edited, compiled, function_at, source_of
from simulator.planted.registry import PLANTED, plant_of, planted
from tests.planted.sweep import TEST_TIMEOUT_S, Outcomes

BREAKS = Path(__file__).with_name("breaks.json")
MOST = 80  # tests of one plant
COARSE = 15  # of as many that fail, or more, nobody can tell what the mistake was
WHERE = [*(f"tests/unit/{of}" for of in ("kvmd", "iommufdd", "device_sim", "protocol")), "tests/properties"]

Breaks = dict[str, dict[str, int]]
"""Of each plant: tests that come to its functions, of which so many ran, and so many failed."""


def breaks(record: Path = BREAKS) -> Breaks:
    try:
        found: Breaks = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {}
    return found


def coarse(record: Path = BREAKS) -> list[str]:
    return [name for name, found in breaks(record).items() if found["failed"] >= COARSE]


class Reach:
    """A pytest plugin: of each place of an edit the tests that came there."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = {}
        self._here: set[str] = set()

    def watch(self, where: str) -> None:
        """The function says from now on, first of all, that it was there."""
        function, name = function_at(where), f"_reached_{len(self.tests)}"
        source = source_of(function)
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
        first = definition.body[0]
        lines = source.splitlines(keepends=True)
        lines.insert(first.lineno - 1, textwrap.indent(f"{name}()\n", " " * first.col_offset))
        function.__globals__[name] = lambda: self._here.add(where)
        function.__code__ = compiled("reach", function, Edited("".join(lines)))
        self.tests[where] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._here.clear()
        done = yield
        for where in self._here:
            self.tests[where].append(item.nodeid)
        return done


class Forks:
    """A pytest plugin: what is collected runs in forks."""

    def __init__(self, plants: list[str], record: Path) -> None:
        self._plants = plants
        self._record = record

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = list(session.items)
        reached = _in_a_fork(lambda: _reached(session))
        for name in self._plants:
            came = {test for edit in PLANTED[name].edits for test in reached[edit.where]}
            chosen = [item for item in items if item.nodeid in came]
            if len(chosen) > MOST:
                drawn = {item.nodeid for item in random.Random(name).sample(chosen, MOST)}
                chosen = [item for item in chosen if item.nodeid in drawn]
            failed = _in_a_fork(lambda name=name, chosen=chosen: _failed(session, name, chosen))  # type: ignore[misc]
            all_of = breaks(self._record) | {
                name: {"reach": len(came), "ran": len(chosen), "failed": len(failed["tests"])}
            }
            ordered = {plant: all_of[plant] for plant in PLANTED if plant in all_of}
            self._record.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {all_of[name]}", file=sys.stderr, flush=True)
        return True


def _reached(session: pytest.Session) -> dict[str, list[str]]:
    reach = Reach()
    for where in dict.fromkeys(edit.where for plant in PLANTED.values() for edit in plant.edits):
        reach.watch(where)
    session.config.pluginmanager.register(reach)
    run_all(session)
    return reach.tests


def _failed(session: pytest.Session, name: str, chosen: list[pytest.Item]) -> dict[str, list[str]]:
    outcomes = Outcomes()
    session.config.pluginmanager.register(outcomes)
    session.items[:] = chosen
    with planted(name):
        run_all(session)
    return {"tests": list(outcomes.failed)}


def _in_a_fork(work: Callable[[], dict[str, list[str]]]) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as made:
        into = Path(made) / "done.json"
        child = os.fork()
        if not child:
            status = 1
            try:
                into.write_text(json.dumps(work()), encoding="utf-8")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0, "the fork died"
        done: dict[str, list[str]] = json.loads(into.read_text(encoding="utf-8"))
        return done


def main() -> int:
    options = argparse.ArgumentParser("python -m tests.planted.breaks", description=__doc__)
    options.add_argument("ids", nargs="*", metavar="ID", help="of planted bugs; those that are not on record")
    options.add_argument("--in", nargs="+", dest="paths", metavar="PATH", default=WHERE, help="of tests")
    options.add_argument("--record", type=Path, metavar="FILE", default=BREAKS, help="of what comes of it")
    given = options.parse_args()
    on_record = breaks(given.record)
    plants = [plant_of(name).id for name in given.ids] or [name for name in PLANTED if name not in on_record]
    os.environ["PYTEST_TIMEOUT"] = str(TEST_TIMEOUT_S)
    argv = [*given.paths, "-q", "--tb=no", "-p", "no:cacheprovider"]
    status = pytest.main(argv, plugins=[Forks(plants, given.record)])
    print(f"too coarse: {', '.join(coarse(given.record)) or 'none'}", file=sys.stderr)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
