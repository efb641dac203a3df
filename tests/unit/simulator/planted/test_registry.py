"""Every planted bug applies to the product as it is, and a test fails with it on.

The killer of each is run with the bug in it, by `--plant`; that it passes without is what the rest of the
suite shows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.core.tables.flush import Flusher
from qemu_shim.vmm.interrupt import EXIT_USAGE
from simulator.planted.__main__ import main
from simulator.planted.device_sim import SILICON
from simulator.planted.edges import EDGES
from simulator.planted.iommufdd_areas import IOMMUFDD_AREAS
from simulator.planted.iommufdd_driver import IOMMUFDD_DRIVER
from simulator.planted.iommufdd_objects import IOMMUFDD_OBJECTS
from simulator.planted.iommufdd_pages import IOMMUFDD_PAGES
from simulator.planted.kvmd_exports import KVMD_EXPORTS
from simulator.planted.kvmd_memory import KVMD_MEMORY
from simulator.planted.kvmd_process import KVMD_PROCESS
from simulator.planted.kvmd_tdp import KVMD_TDP
from simulator.planted.plant import function_at
from simulator.planted.registry import PLANTED, UnknownPlant, current, planted
from tests.patience import WHOLE_RUN_S
from tests.planted.breaks import breaks
from tests.planted.plugin import Plants
from tests.planted.sweep import killers

ROOT = Path(__file__).parents[4]
INVARIANTS = {
    match[1]
    for match in re.finditer(r"^\| ([IR]\d+) \|", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE)
}
A_PLANT = "B-18-drain-is-skipped"
PARTS = 8  # for as many workers


@pytest.mark.parametrize("name", PLANTED)
def test_it_applies_to_the_product_as_it_is_and_leaves_no_trace(name: str, plant: Plants) -> None:
    functions = [function_at(edit.where) for edit in PLANTED[name].edits]
    before = [function.__code__ for function in functions]
    with planted(name):
        assert current() == name
        assert all(function.__code__ is not code for function, code in zip(functions, before, strict=True))
    assert [function.__code__ for function in functions] == before
    assert current() is None


@pytest.mark.parametrize("name", PLANTED)
def test_it_says_what_it_is_and_belongs_to_an_invariant(name: str) -> None:
    bug = PLANTED[name]
    assert bug.invariant in INVARIANTS
    assert re.fullmatch(r"\w.{10,108}\.", bug.what), len(bug.what)
    numbered = re.match(r"[RBI]-?\d+", name)
    assert numbered is None or numbered[0] in (*bug.races, bug.invariant), "its id names what it is"
    assert all(re.fullmatch(r"R([1-9]|1\d|2[0-8])|B-(0[1-9]|[1-3]\d|40)", race) for race in bug.races)


def test_the_killers_are_of_plants_there_are_and_tests_there_are() -> None:
    assert list(killers()) == [name for name in PLANTED if name in killers()]
    for name, tests in killers().items():
        assert tests, name
        for test in tests:
            path, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize("part", range(PARTS))
def test_its_killer_fails_with_it_on(part: int, plant: Plants) -> None:
    plants = list(killers())[part::PARTS]
    argv = [sys.executable, "-m", "tests.planted.killing", *plants]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    assert json.loads(done.stdout) == [], done.stderr


def test_who_does_not_fail_is_said() -> None:
    """A plant whose killer has nothing to do with it."""
    code = (
        "from tests.planted import killing\n"
        "killing.killers = lambda: {'R16-bit-11': ['tests/unit/simulator/planted/test_plant.py']}\n"
        "print(killing.survivors(['R16-bit-11']))"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said == "['R16-bit-11']\n"


def test_what_is_on_record_of_breaking_tests_is_of_plants_there_are() -> None:
    assert list(breaks()) == [name for name in PLANTED if name in breaks()]
    assert all(found["failed"] <= found["ran"] <= found["reach"] for found in breaks().values())


def test_a_plant_is_tried_on_the_tests_that_come_to_its_functions(tmp_path: Path) -> None:
    """Of a flusher's tests one makes the change that it is of, and fails."""
    record = tmp_path / "breaks.json"
    argv = [sys.executable, "-m", "tests.planted.breaks", "R5-epoch-too-early", "--record", str(record)]
    argv += ["--in", "tests/unit/kvmd/test_flush.py"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    assert "too coarse: none" in done.stderr, done.stderr
    assert breaks(record) == {"R5-epoch-too-early": {"reach": 1, "ran": 1, "failed": 1}}


# -- the registry --------------------------------------------------------------------------------------


def test_no_two_have_one_id() -> None:
    kvmd = (KVMD_TDP, KVMD_MEMORY, KVMD_PROCESS, KVMD_EXPORTS)
    iommufdd = (IOMMUFDD_DRIVER, IOMMUFDD_OBJECTS, IOMMUFDD_AREAS, IOMMUFDD_PAGES)
    areas = (*kvmd, *iommufdd, SILICON, EDGES)
    assert sum(map(len, areas)) == len(PLANTED)


def test_one_mistake_at_a_time(plant: Plants) -> None:
    drain = Flusher.drain.__code__
    with (
        planted(A_PLANT),
        pytest.raises(RuntimeError, match=f"{A_PLANT} is planted already"),
        planted("R4-acks-not-awaited"),
    ):
        raise AssertionError("two at once")
    assert Flusher.drain.__code__ is drain
    assert current() is None


def test_an_unknown_id_names_those_that_are_near() -> None:
    with pytest.raises(UnknownPlant, match=A_PLANT), planted("B-18-drain-skipped"):
        raise AssertionError("it is planted")


# -- the command ---------------------------------------------------------------------------------------


def test_the_list_says_each_with_its_invariant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PLANTED)
    assert main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in listed] == list(PLANTED)
    assert all(one["functions"] and one["what"] and one["invariant"] for one in listed)


def test_an_unknown_id_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["B-18", "kvmd"]) == EXIT_USAGE
    assert A_PLANT in capsys.readouterr().err


def test_a_daemon_is_said_with_its_bug() -> None:
    with pytest.raises(SystemExit) as ended:
        main([A_PLANT])
    assert ended.value.code == EXIT_USAGE


def test_every_python_that_a_test_starts_has_it_too(tmp_path: Path) -> None:
    test = tmp_path / "test_child.py"
    test.write_text(
        "import subprocess, sys\n"
        "from simulator.planted.registry import current\n"
        "def test_both():\n"
        "    assert current() == 'B-18-drain-is-skipped'\n"
        "    ask = 'from simulator.planted.registry import current; print(current())'\n"
        "    assert subprocess.check_output([sys.executable, '-c', ask], text=True).strip() == current()\n"
    )
    argv = [sys.executable, "-m", "pytest", str(test), "--plant", A_PLANT, "-q", "-p", "tests.planted.plugin"]
    argv += ["--rootdir", str(tmp_path), "-c", os.devnull, "-p", "no:cacheprovider"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
