"""`qemu-shim campaign` where it runs no point: what it says, its status, and that it makes nothing."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from qemu_shim.cli import main
from qemu_shim.study.campaign import cluster
from qemu_shim.study.campaign.code import code_version
from qemu_shim.study.campaign.plan import Plan
from qemu_shim.study.campaign.store import Store

PLAN = Plan(("dmatest",), ("shared",), (0, 1, 2), {"buf_kib": [4]})
KEYS = [f"dmatest/shared/{seed}/buf_kib=4,transfer_kib=4" for seed in range(3)]
SAID = ["--workloads", "dmatest", "--designs", "shared", "--seeds", "0..2", "--set", "buf_kib=4"]


def campaign(*arguments: str, out: Path) -> int:
    return main(["campaign", *arguments, "--out", str(out)])


def filled(out: Path) -> None:
    """The first point is done, the second has failed."""
    points = PLAN.points()
    with Store(out, points, code_version()) as store:
        store.add(points[1].failed("broken"))
        done = points[0].failed("")
        done.problems.clear()
        store.add(done)


def test_a_dry_run_says_what_would_be_run_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign(*SAID, "--dry-run", out=tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines() == [*KEYS, "3 of 3 points would be run"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "missing"), [([], KEYS[2:]), (["--retry-failed"], KEYS[1:])])
def test_where_there_are_runs_it_says_what_is_missing(
    more: list[str], missing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    assert campaign("--dry-run", "--json", *more, out=tmp_path) == 0
    assert json.loads(capsys.readouterr().out) == {"points": 3, "missing": missing}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (
            "boot-touch",
            "boot-touch is a workload, and there is no plan of that name: say --workloads boot-touch",
        ),
        ("gone.toml", "gone.toml: No such file or directory"),
        (".", ".: Is a directory"),
    ],
)
def test_a_plan_that_is_not_there_is_a_wrong_command(
    plan: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert campaign(plan, out=tmp_path / "out") == 2
    assert capsys.readouterr().err == f"qemu-shim: {why}\n"


def test_options_replace_what_the_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("workloads = ['dmatest']\nseeds = '0..9'\n[params]\nbuf_kib = 8\ntransfer_kib = 4\n")
    said = ["--designs", "shared", "--seeds", "7", "--set", "buf_kib=4"]
    assert campaign(str(plan), *said, "--dry-run", out=tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[0] == "dmatest/shared/7/buf_kib=4,transfer_kib=4"


def test_options_of_daemons_are_part_of_what_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("[options]\nkvmd = '--no-pml'\niommufdd = '--premap-pages 2'\n")
    said = [*SAID[:-2], "--seeds", "0", "--set", "buf_kib=4", "--iommufdd", "--premap-pages 8"]
    assert campaign(str(plan), *said, "--dry-run", out=tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{KEYS[0]} --kvmd --no-pml --iommufdd '--premap-pages 8'"
    )


def test_a_store_is_of_the_options_it_was_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    assert campaign(*SAID, "--kvmd", "--no-pml", out=tmp_path) == 2
    assert "is of a campaign of 3 other points" in capsys.readouterr().err


def test_a_campaign_with_nothing_left_to_do_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = PLAN.points()[:1]
    with Store(tmp_path, points, code_version()) as store:
        store.add(points[0].failed("broken"))
    assert campaign(out=tmp_path) == 1, "one failed, and stays failed"
    told = capsys.readouterr()
    assert told.out.splitlines() == ["1 points, 1 failed"]
    failed, hint = told.err.splitlines()[-2:]
    assert failed == f"FAILED {KEYS[0]}: broken"
    assert hint.startswith("to see more, play one alone")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--designs", "nosuch"], "no design 'nosuch'"),
        (["--set", "pages"], "numbers such as"),
        (["--set", "nosuch=1"], "has a parameter nosuch"),
        (["--seeds", "9..0"], "from low to high"),
    ],
)
def test_a_wrong_plan_is_told_and_makes_nothing(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign(*arguments, out=tmp_path / "out") == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_store_of_another_campaign_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    assert campaign(*SAID[:-2], out=tmp_path) == 2
    assert "is of a campaign of 3 other points" in capsys.readouterr().err


def test_a_scheduler_that_cannot_be_reached_is_told_and_the_store_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    monkeypatch.setattr(cluster, "CONNECT_S", 0.2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        assert campaign("--scheduler", address, out=tmp_path) == 1
    err = capsys.readouterr().err
    assert f"qemu-shim: --scheduler {address}: " in err
    assert f"go on with: qemu-shim campaign --out {tmp_path} --scheduler {address}" in err
    with Store(tmp_path, None, code_version()) as store:
        assert [point.key for point in store.missing()] == KEYS[2:]


def test_without_the_extra_a_scheduler_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert campaign("--scheduler", "tcp://127.0.0.1:1", out=tmp_path) == 1
    assert "--scheduler needs the extra dask" in capsys.readouterr().err


def test_a_worker_of_a_cluster_that_has_other_code_runs_nothing() -> None:
    with pytest.raises(
        cluster.OtherCode, match=f"the worker's code is {code_version()}, the campaign's other"
    ):
        cluster._on_worker(PLAN.points()[0], "other", "stop")
