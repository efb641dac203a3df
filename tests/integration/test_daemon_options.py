"""`--kvmd`, `--iommufdd`, `--device-sim` of run, compare and campaign reach the daemons and the results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.study.campaign.code import code_version
from qemu_shim.study.campaign.store import RUNS, Store
from qemu_shim.study.compare.schema import Comparison
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import connect_host
from tests.integration.scratch import Scratch, scratched
from tests.kit.daemons import system

DMATEST = ("dmatest", "--designs", "mirror")
EIGHT = ("--iommufdd", "--premap-pages 8")


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


def io_faults(scratch: Scratch, path: Path, *options: str) -> int:
    status, _, err = scratch.run("compare", *DMATEST, "--json", str(path), *options)
    assert status == 0, err
    (workload,) = Comparison.model_validate_json(path.read_bytes()).workloads
    return workload.designs[0].faults.io


def test_compare_counts_on_daemons_with_the_options_it_was_given(scratch: Scratch, tmp_path: Path) -> None:
    """Two buffers of 256 pages, and the page of completion records."""
    assert io_faults(scratch, tmp_path / "1.json") == 2 * 256 + 1
    assert io_faults(scratch, tmp_path / "8.json", *EIGHT) == 2 * 256 // 8 + 1


def test_a_campaign_keeps_its_runs_under_the_options(scratch: Scratch, tmp_path: Path) -> None:
    plan = ("--workloads", "dmatest", "--designs", "mirror", "--set", "buf_kib=64")
    status, _, err = scratch.run("campaign", *plan, *EIGHT, "--out", str(tmp_path))
    assert status == 0, err
    with Store(tmp_path, None, code_version()) as store:
        ((point, run),) = store.runs.items()
    assert point.key.endswith("buf_kib=64,transfer_kib=4 --iommufdd '--premap-pages 8'")
    assert run.samples[-1].counts["io_faults"] == 2 * 16 // 8 + 1
    status, _, err = scratch.run("campaign", *plan, "--out", str(tmp_path))
    assert (status, "is of a campaign of 1 other points" in err) == (2, True)


def test_a_scenario_is_played_on_daemons_with_them_wherever_they_stand(scratch: Scratch) -> None:
    for argv in (("dmatest", "--device-sim", "--no-pri"), ("--device-sim=--no-pri", "dmatest")):
        status, out, _ = scratch.run("run", *argv)
        assert status == 1
        assert "dsa0 cannot ask for pages: ATS True, PRI False" in out


@pytest.mark.parametrize("command", [("compare", *DMATEST), ("campaign", "--workloads", "dmatest")])
def test_options_that_a_daemon_refuses_are_status_2_before_anything_is_run(
    scratch: Scratch, command: tuple[str, ...], tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path)) if command[0] == "campaign" else ()
    status, _, err = scratch.run(*command, *out, "--kvmd", "--no-such-thing")
    assert status == 2
    assert "kvmd ended with status 2" in err
    assert "unrecognized arguments: --no-such-thing" in err
    assert not (tmp_path / RUNS).exists() or (tmp_path / RUNS).read_bytes() == b""


@pytest.mark.parametrize("design", ["mirror", "notifier"])
async def test_a_premap_does_not_take_the_last_frames_from_a_vcpu(design: str) -> None:
    """A host with frames for half of what is swept through; a fault may take 512 pages."""
    with system({"kvmd": ["--ram", "1G"], "iommufdd": ["--premap-pages", "512"]}) as scarce:
        async with connect_host(scarce.directory) as host:
            small = {"pages": 96, "window": 16}
            run = await run_scenario(host, WORKLOADS["streaming"], DESIGNS[design], 1, small)
    assert run.problems == []
    assert [sample.step for sample in run.samples][-1] == "cpu reads everything"
