"""What a plan says is what is run: each combination once, under a key that means the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_shim.study.campaign.plan import MAX_POINTS, BadPlan, Plan, numbers, plan_of, read_plan
from qemu_shim.study.campaign.point import Point, point_as_json, point_from, point_of
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS

FILE = """
workloads = ["boot-touch", "dmatest"]
designs = ["shared"]
seeds = "0..1"
[params]
pages = [8, 16]
dmatest.buf_kib = 64
"""


def test_a_point_is_named_by_all_that_its_run_depends_on() -> None:
    point = Point.of("device-first", "shared", 3, {"pages": 8})
    assert point.key == "device-first/shared/3/cpu_first=0,pages=8,ram_mib=64"
    assert point == Point.of("device-first", "shared", 3, {"pages": 8, "cpu_first": 0})
    assert point_from(point_as_json(point)) == point


def test_a_point_is_named_by_its_daemons_options_too() -> None:
    """The same words in another spelling are the same point; no words are none."""
    options = {"iommufdd": "--premap-pages  8", "kvmd": ""}
    point = Point.of("dmatest", "mirror", 3, {"buf_kib": 4}, options)
    assert point.key == "dmatest/mirror/3/buf_kib=4,transfer_kib=4 --iommufdd '--premap-pages 8'"
    assert point == Point.of("dmatest", "mirror", 3, {"buf_kib": 4}, {"iommufdd": "'--premap-pages' 8"})
    assert point != Point.of("dmatest", "mirror", 3, {"buf_kib": 4})
    assert point_from(point_as_json(point)) == point
    assert point_of(point.failed("")) == point


def test_a_plan_without_a_word_is_every_workload_on_every_design() -> None:
    points = Plan().points()
    assert {(point.workload, point.design) for point in points} == {
        (w, d) for w in WORKLOADS for d in DESIGNS
    }
    assert len(points) == len(WORKLOADS) * len(DESIGNS)


def test_a_file_is_every_combination_of_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(FILE, encoding="utf-8")
    assert [point.key for point in read_plan(path).points()] == [
        "boot-touch/shared/0/pages=8,ram_mib=64,untouched=32",
        "boot-touch/shared/1/pages=8,ram_mib=64,untouched=32",
        "boot-touch/shared/0/pages=16,ram_mib=64,untouched=32",
        "boot-touch/shared/1/pages=16,ram_mib=64,untouched=32",
        "dmatest/shared/0/buf_kib=64,transfer_kib=4",
        "dmatest/shared/1/buf_kib=64,transfer_kib=4",
    ]


def test_a_point_said_twice_is_one() -> None:
    plan = Plan(
        ("dmatest", "dmatest"), ("shared",), (1, 1), {"buf_kib": [64, 64], "dmatest.transfer_kib": [4]}
    )
    assert [point.seed for point in plan.points()] == [1]


def test_a_parameter_said_of_one_workload_goes_before_that_of_all() -> None:
    params = {"pages": [8, 16], "boot-touch.pages": [32]}
    plan = Plan(("boot-touch", "device-first"), ("shared",), (0,), params)
    assert [(p.workload, dict(p.params)["pages"]) for p in plan.points()] == [
        ("boot-touch", 32),
        ("device-first", 8),
        ("device-first", 16),
    ]


@pytest.mark.parametrize(
    ("text", "meant"), [("3", [3]), ("0..3", [0, 1, 2, 3]), ("7,1..2", [7, 1, 2]), ("5..5", [5])]
)
def test_numbers_are_said_one_by_one_or_as_ranges_with_both_ends(text: str, meant: list[int]) -> None:
    assert numbers(text) == meant


@pytest.mark.parametrize("text", ["", "x", "1..", "..2", "3..1", "1;2", f"0..{MAX_POINTS}", "1,,2"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadPlan):
        numbers(text)


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (Plan(workloads=["nosuch"]), "no workload 'nosuch'"),
        (Plan(designs=["nosuch"]), "no design 'nosuch'"),
        (Plan(seeds=[-1]), "seed -1"),
        (Plan(seeds=[1 << 63]), "seed 9223372036854775808"),
        (Plan(params={"nosuch": [1]}), "parameter nosuch"),
        (Plan(params={"dmatest.nosuch": [1]}), "dmatest has no parameter nosuch"),
        (Plan(("dmatest",), params={"boot-touch.pages": [1]}), "parameter boot-touch.pages"),
        (Plan(("boot-touch",), params={"pages": [0]}), "boot-touch: pages 0"),
        (Plan(("dmatest",), ("shared",), range(1 << 40)), f"{1 << 40} points"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why(plan: Plan, word: str) -> None:
    with pytest.raises(BadPlan, match=word):
        plan.points()


@pytest.mark.parametrize(
    "text",
    [
        "workload = ['dmatest']",
        "workloads = 'dmatest'",
        "workloads = []",
        "workloads = [1]",
        "seeds = ['1']",
        "seeds = true",
        "seeds = 1.5",
        "params = 3",
        "params.pages = '1..2'",
        "params.dmatest.buf_kib.x = 1",
        "params.pages = []",
        "options.kvmd = 1",
        'options.kvmd = "\'"',
        "options.kvmd = '--sock=x'",
        "options.qemu = '-m 1G'",
        "options = 3",
        "not toml",
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadPlan, match=r"plan\.toml: "):
        read_plan(path)


def test_a_file_may_give_the_daemons_options() -> None:
    plan = plan_of({"workloads": ["dmatest"], "designs": ["shared"], "options": {"kvmd": "--no-pml"}})
    assert [point.options for point in plan.points()] == [(("kvmd", "--no-pml"),)]


def test_a_file_may_say_one_number() -> None:
    assert plan_of({"seeds": 4}).seeds == [4]
