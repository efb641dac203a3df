"""The store: what was added is there after whatever happened, and nobody else's runs get in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.campaign.store import CAMPAIGN_FILE, RUNS, Store, StoreRefused

POINTS = [Point("w", "shared", seed, (("pages", 4),)) for seed in range(4)]


def run_of(seed: int, faults: int = 7) -> Run:
    samples = [Sample("start", {"io_faults": 0}, {}), Sample("first dma", {"io_faults": faults}, {"x.y": 1})]
    return Run("w", "shared", seed, {"pages": 4}, samples, [Refusal("a", "b")])


def filled(directory: Path, *seeds: int) -> None:
    with Store(directory, POINTS, "code") as store:
        for seed in seeds:
            store.add(run_of(seed))


def seeds_in(directory: Path) -> list[int]:
    with Store(directory, None, "code") as store:
        assert all(run == run_of(run.seed) for run in store.runs.values())
        return [run.seed for run in store.runs.values()]


def refusal(directory: Path, points: list[Point] | None = None, code: str = "code") -> str:
    with pytest.raises(StoreRefused) as caught:
        Store(directory, points, code)
    return str(caught.value)


def test_a_second_start_finds_what_the_first_added(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "store", 0, 2)
    with Store(tmp_path / "new" / "store", POINTS, "code") as store:
        assert [point.seed for point in store.missing()] == [1, 3]
        store.add(run_of(1))
    assert seeds_in(tmp_path / "new" / "store") == [0, 2, 1]


def test_wherever_the_last_line_is_torn_only_its_run_is_lost(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1)
    path = tmp_path / RUNS
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(first, len(data)):
        path.write_bytes(data[:length])
        assert seeds_in(tmp_path) == [0]
        filled(tmp_path, 2)
        assert seeds_in(tmp_path) == [0, 2], "the next line does not run into the torn one"


def test_a_line_damaged_in_the_middle_is_told_and_not_passed_over(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1, 2)
    path = tmp_path / RUNS
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (lines[1][:-9] + b"\n", b"[]\n", b'{"workload": 1}\n', b"\n"):
        path.write_bytes(lines[0] + damage + lines[2])
        assert "line 2 is damaged" in refusal(tmp_path)


def test_the_later_run_of_a_point_counts(tmp_path: Path) -> None:
    with Store(tmp_path, POINTS, "code") as store:
        store.add(POINTS[0].failed("broken"))
        assert POINTS[0] not in store.missing()
        assert POINTS[0] in store.missing(retry_failed=True)
        store.add(run_of(0))
        assert POINTS[0] not in store.missing(retry_failed=True)
    assert seeds_in(tmp_path) == [0]


def test_runs_of_other_code_or_another_plan_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, 0)
    assert "other code (code, now edoc)" in refusal(tmp_path, POINTS, "edoc")
    assert "4 other points (1 asked for are not in it, 1 of it are not asked for)" in refusal(
        tmp_path, [*POINTS[1:], Point("w", "shared", 9, (("pages", 4),))]
    )
    filled(tmp_path, 1)
    assert seeds_in(tmp_path) == [0, 1], "what was refused has changed nothing"


def test_a_run_that_nobody_planned_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 0)
    with (tmp_path / RUNS).open("a") as file:
        file.write((tmp_path / RUNS).read_text().replace('"seed":0', '"seed":44'))
    assert "w/shared/44/pages=4 is not of this campaign" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b'{"format": 2, "code": "code"}', "damaged"),
        (b'{"format": 2, "code": "code", "points": [{"seed": 1}]}', "damaged"),
        (b'{"format": 1, "code": "code"}', "format 1, this is for format 2"),
    ],
)
def test_a_header_of_another_kind_is_refused(header: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / CAMPAIGN_FILE).write_bytes(header)
    assert word in refusal(tmp_path, POINTS)


def test_a_directory_without_a_campaign_is_none(tmp_path: Path) -> None:
    assert "no directory" in refusal(tmp_path / "nosuch")
    assert not (tmp_path / "nosuch").exists()
    assert "holds no campaign" in refusal(tmp_path)
    (tmp_path / RUNS).write_text("somebody's\n")
    assert "holds no campaign" in refusal(tmp_path, POINTS)
    assert (tmp_path / RUNS).read_text() == "somebody's\n"


def test_a_start_that_was_cut_off_before_the_header_was_whole_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "campaign.new").write_text('{"format": 2, "po')
    filled(tmp_path, 3)
    assert seeds_in(tmp_path) == [3]


def test_two_at_once_are_refused_and_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from qemu_shim.study.campaign.store import Store\n"
        f"with Store(Path({str(tmp_path)!r}), None, 'code'): print('open', flush=True); time.sleep(60)"
    )
    filled(tmp_path, 0)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        assert "another campaign is at work" in refusal(tmp_path, POINTS)
        holder.kill()
    assert seeds_in(tmp_path) == [0]


def test_where_there_is_no_room_for_a_run_the_store_stays_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path, POINTS, "code") as store:
        store.add(run_of(0))
        write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
            with pytest.raises(OSError, match="no room"):
                store.add(run_of(1))
        assert len(store.missing()) == 3
        store.add(run_of(2))
    assert seeds_in(tmp_path) == [0, 2]


def test_a_refused_store_keeps_no_fd(tmp_path: Path) -> None:
    filled(tmp_path, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refusal(tmp_path, POINTS, "edoc")
    with (tmp_path / RUNS).open("a") as file:
        file.write(json.dumps([]) + "\n")
    refusal(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before
