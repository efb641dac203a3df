"""`qemu-shim campaign` as a person runs it, killed in every place: nothing is lost, nothing is left, and the
numbers are the same wherever a point was run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.code import code_version
from qemu_shim.study.campaign.store import RUNS, Store
from tests.integration.scratch import Scratch, scratched
from tests.kit.daemons import short_directory, until
from tests.patience import WHOLE_RUN_S

POINTS = 3
PLAN = ("--workloads", "boot-touch", "--designs", "shared", "--seeds", "0..2", "--set", "pages=24")


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The runs of a campaign that nothing happened to."""
    out = tmp_path_factory.mktemp("reference")
    with short_directory() as directory:
        status, _, err = Scratch(directory).run("campaign", *PLAN, "--out", str(out))
    assert status == 0, err
    return runs_in(out)


def runs_in(out: Path) -> list[Run]:
    """In the order of the points."""
    with Store(out, None, code_version()) as store:
        assert store.missing() == []
        return [store.runs[point] for point in store.points]


def finished(out: Path) -> int:
    return (out / RUNS).read_bytes().count(b"\n") if (out / RUNS).exists() else 0


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def running(scratch: Scratch, what: bytes) -> list[int]:
    return [pid for pid in scratch.processes() if what in command(pid).split(b"\0")]


def kill_a_busy_worker(scratch: Scratch) -> None:
    """The process whose children a point's daemons are; the point may be over before it is found."""

    def killed() -> bool:
        workers = set(scratch.processes())
        for daemon in running(scratch, b"kvmd"):
            with suppress(OSError):
                stat = Path(f"/proc/{daemon}/stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                if parent in workers:
                    os.kill(parent, signal.SIGKILL)
                    return True
        return False

    until(killed, "a worker is busy")


@contextmanager
def frozen(scratch: Scratch) -> Iterator[None]:
    """Every process of the run stands still."""
    pids = scratch.processes()

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    tell(signal.SIGSTOP)
    yield
    tell(signal.SIGCONT)


def begin(scratch: Scratch, out: Path, *more: str) -> subprocess.Popen[str]:
    """A campaign that has finished one point and runs others."""
    process = scratch.start("campaign", *PLAN, "--out", str(out), "--jobs", "2", *more)
    until(
        lambda: finished(out) >= 1 and running(scratch, b"kvmd") != [],
        "a point is done, others run",
        WHOLE_RUN_S,
    )
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WHOLE_RUN_S)
    return process.returncode, out, err


def test_what_ran_before_the_campaign_was_killed_is_not_run_again(
    scratch: Scratch, reference: list[Run], tmp_path: Path
) -> None:
    process = begin(scratch, tmp_path)
    process.kill()
    end(process)
    scratch.check_nothing_left()
    kept = (tmp_path / RUNS).read_bytes()
    assert 1 <= finished(tmp_path) < POINTS
    status, out, err = scratch.run("campaign", "--out", str(tmp_path), "--json")
    assert status == 0, err
    assert (tmp_path / RUNS).read_bytes().startswith(kept)
    assert finished(tmp_path) == POINTS
    assert runs_in(tmp_path) == reference
    document = json.loads(out)
    assert (document["points"], document["failed"]) == (POINTS, [])
    assert document["groups"][0]["seeds"] == [0, 1, 2]
    assert document["groups"][0]["figures"]["cpu_faults"]["min"] == 24


def test_a_worker_that_is_killed_loses_no_point(
    scratch: Scratch, reference: list[Run], tmp_path: Path
) -> None:
    process = begin(scratch, tmp_path)
    kill_a_busy_worker(scratch)
    status, _, err = end(process)
    assert status == 0, err
    assert finished(tmp_path) == POINTS
    assert runs_in(tmp_path) == reference


def test_an_interrupt_leaves_no_daemon_and_a_store_that_goes_on(
    scratch: Scratch, reference: list[Run], tmp_path: Path
) -> None:
    process = begin(scratch, tmp_path)
    with frozen(scratch):  # or it could be over before the second has begun
        second = scratch.run("campaign", "--out", str(tmp_path))
        os.killpg(process.pid, signal.SIGINT)
    assert (second[0], "another campaign is at work" in second[2]) == (2, True)
    status, _, err = end(process)
    scratch.check_nothing_left()
    assert status == 130, err
    left = POINTS - finished(tmp_path)
    assert f"interrupted, {left} points are missing and nothing is left" in err
    assert f"go on with: qemu-shim campaign --out {tmp_path}" in err
    assert scratch.run("campaign", "--out", str(tmp_path))[0] == 0
    assert runs_in(tmp_path) == reference


def test_a_point_that_fails_is_named_and_the_others_are_run(scratch: Scratch, tmp_path: Path) -> None:
    """More pages than the guest has memory."""
    plan = ("--workloads", "boot-touch", "--designs", "shared", "--set", "pages=8,60000")
    status, out, err = scratch.run("campaign", *plan, "--out", str(tmp_path))
    assert status == 1
    assert "FAILED boot-touch/shared/0/pages=60000,ram_mib=64,untouched=32: " in err
    assert out.splitlines()[-1] == "2 points, 1 failed"


# -- a cluster -----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


class Cluster:
    """A scheduler and two workers of one thread, each a process, with a scratch directory of their own."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        self._processes = [
            self._start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-show"),
            self._start("worker", self.address, "--nworkers", "2", "--nthreads", "1"),
        ]

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.scratch.directory / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, "--no-dashboard"],
                env={**os.environ, "TMPDIR": str(self.scratch.directory)},
                cwd=self.scratch.directory,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(WHOLE_RUN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        until(lambda: self.scratch.processes() == [], "every process of the cluster has ended")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with short_directory() as directory:
        made = Cluster(Scratch(directory))
        try:
            yield made
        finally:
            made.stop()


def begin_on(cluster: Cluster, scratch: Scratch, out: Path) -> subprocess.Popen[str]:
    process = scratch.start("campaign", *PLAN, "--out", str(out), "--scheduler", cluster.address)
    until(
        lambda: finished(out) >= 1 and running(cluster.scratch, b"kvmd") != [],
        "a point is done, others run",
        60,
    )
    return process


def test_a_cluster_counts_the_same_also_when_one_of_its_workers_is_killed(
    cluster: Cluster, scratch: Scratch, reference: list[Run], tmp_path: Path
) -> None:
    process = begin_on(cluster, scratch, tmp_path)
    kill_a_busy_worker(cluster.scratch)
    status, _, err = end(process)
    assert status == 0, err
    assert finished(tmp_path) == POINTS
    assert runs_in(tmp_path) == reference


def test_an_interrupt_stops_what_runs_on_a_cluster_and_the_rest_can_be_run_here(
    cluster: Cluster, scratch: Scratch, reference: list[Run], tmp_path: Path
) -> None:
    process = begin_on(cluster, scratch, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = end(process)
    assert running(cluster.scratch, b"kvmd") == [], "they have stopped before the campaign ends"
    assert status == 130, err
    assert f"go on with: qemu-shim campaign --out {tmp_path} --scheduler {cluster.address}" in err
    assert scratch.run("campaign", "--out", str(tmp_path))[0] == 0
    assert runs_in(tmp_path) == reference
