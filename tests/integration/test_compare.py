"""`qemu-shim compare` as a person runs it: the files it writes, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_shim.study.compare.schema import Comparison, DesignFigures
from tests.integration.scratch import Scratch
from tests.kit.daemons import short_directory, until
from tests.patience import WHOLE_RUN_S

DMATEST = ("compare", "dmatest", "--designs", "mirror,shared")


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with short_directory() as directory:
        made = Scratch(directory)
        yield made
        made.check_nothing_left()


def of(comparison: Comparison) -> dict[str, DesignFigures]:
    (workload,) = comparison.workloads
    return {it.design: it for it in workload.designs}


def test_the_same_seed_gives_the_same_figures_however_many_processes_run(
    scratch: Scratch, tmp_path: Path
) -> None:
    written = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.json"
        status, out, err = scratch.run(*DMATEST, "--jobs", jobs, "--json", str(path))
        assert (status, len(err.splitlines())) == (0, 2), err
        assert "IO page faults" in out
        written.append(Comparison.model_validate_json(path.read_bytes()))
    assert written[0] == written[1]
    figures = of(written[0])
    assert figures["shared"].faults.io < figures["mirror"].faults.io
    assert figures["shared"].work.dma_bytes == figures["mirror"].work.dma_bytes


def test_figures_of_a_run_with_other_costs_are_the_same_but_for_the_times(
    scratch: Scratch, tmp_path: Path
) -> None:
    costs, path = tmp_path / "costs.toml", tmp_path / "f.json"
    costs.write_text("io_fault_factor = 80\n")
    assert scratch.run(*DMATEST, "--json", str(path))[0] == 0
    before = of(Comparison.model_validate_json(path.read_bytes()))["mirror"]
    assert scratch.run(*DMATEST, "--json", str(path), "--costs", str(costs))[0] == 0
    after = of(Comparison.model_validate_json(path.read_bytes()))["mirror"]
    assert (before.faults, before.told, before.work) == (after.faults, after.told, after.work)
    dearer = before.faults.io_groups * 2 * 70
    assert after.time.total.us == pytest.approx(before.time.total.us + dearer, abs=0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_130_writes_nothing_and_leaves_nothing(
    scratch: Scratch, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "f.json"
    process = scratch.start("compare", "--json", str(path))
    for sign in ("tdp-worker-*", "tdp-worker-*/tdp-*", "tdp-worker-*/tdp-*/*.sock"):  # each takes its time
        until(lambda sign=sign: list(scratch.directory.glob(sign)) != [], f"{sign} is there")  # type: ignore[misc]
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=WHOLE_RUN_S)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: every daemon was stopped, nothing is left"
    assert not path.exists()
