"""The runner sees what it is there to see: a tampered recording differs at its step, and nowhere else."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.kvm import bitmap, replay
from tests.conformance.kvm.__main__ import main
from tests.conformance.kvm.cases import BadFile, Body, load
from tests.conformance.kvm.replay import Outcome
from tests.conformance.kvm.runner import replay_all

HVA, GPA = 0x1000_0000_0000, 0x1000_0000
SIZE = 0x10000
EFAULT = {"errno": "EFAULT", "exit_reason": "KVM_EXIT_UNKNOWN"}


def region(slot: int, *, flags: int = 0, size: int = SIZE, error: int | str = 0) -> Body:
    args = {"slot": slot, "flags": flags, "guest_phys_addr": GPA, "memory_size": size, "userspace_addr": HVA}
    return {"ioctl": "KVM_SET_USER_MEMORY_REGION", "args": args, "errno": error}


def dirty(*runs: list[int]) -> Body:
    out = {"npages": 16, "popcount": sum(count for _, count in runs), "dirty": list(runs)}
    return {"ioctl": "KVM_GET_DIRTY_LOG", "args": {"slot": 1}, "errno": 0, "out": out}


def mmio(gpa: int, **rest: Any) -> Body:
    return {"errno": "0", "exit_reason": "KVM_EXIT_MMIO", "mmio": {"phys_addr": gpa, "len": 1, **rest}}


STORY: list[Body] = [
    {"host": "mmap", "args": {"addr": HVA, "size": SIZE, "prot": "rw", "kind": "anon"}},
    region(1, flags=1),
    region(2, error="EEXIST"),
    {"guest": [["w", GPA + 0x2000, 8, 7], ["r", GPA + 0x2000, 8]], "reads": [7]},
    dirty([2, 1]),
    {
        "guest": [["r", 0x2000_0000, 1], ["w", 0x2000_0001, 1, 5]],
        "reads": [0x33],
        "exits": [mmio(0x2000_0000, is_write=0, reply="33"), mmio(0x2000_0001, is_write=1, data="05")],
    },
    {"host": "peek", "args": {"addr": HVA + 0x2000, "n": 2, "got": "0700"}},
    {
        "guest": [["spin_until_ne", GPA, 0], ["r", GPA, 1]],
        "concurrent": [
            {"host": "write", "args": {"addr": HVA, "hex": "01"}},
            {"host": "peek", "args": {"addr": HVA, "n": 1, "got": "01"}},
        ],
        "reads": [1],
    },
    {"host": "munmap", "args": {"addr": HVA, "size": SIZE}},
    {"guest": [["r", GPA, 8]], "reads": None, "exits": [EFAULT], "done": False},
    {"host": "mmap", "args": {"addr": HVA, "size": SIZE, "prot": "rw", "kind": "anon"}},
    {"guest": "resume", "reads": [0]},
]


def sequence(name: str, steps: list[Body], **marks: Any) -> dict[str, Any]:
    guest = {"cpl": 3, "pt": "2M", "pte_dirty": True}
    return {"name": name, "note": None, "guest": guest, "manual": None, "ring": None, "steps": steps, **marks}


def tampered(change: Callable[[list[Body]], Any]) -> list[Body]:
    steps = copy.deepcopy(STORY)
    change(steps)
    return steps


# What is changed in the story -> where it must be found, and what must be said.
TAMPERED: dict[str, tuple[list[Body], str, str]] = {
    "errno": (
        tampered(lambda steps: steps[2].update(errno="EINVAL")),
        "step 2 (ioctl KVM_SET_USER_MEMORY_REGION): errno",
        "expected EINVAL, came [EEXIST]",
    ),
    "success": (
        tampered(lambda steps: steps[2].update(errno=0)),
        "step 2 (ioctl KVM_SET_USER_MEMORY_REGION): errno",
        "expected 0, came [EEXIST]",
    ),
    "failure": (
        tampered(lambda steps: steps[1].update(errno="EINVAL")),
        "step 1 (ioctl KVM_SET_USER_MEMORY_REGION): errno",
        "expected EINVAL, came 0",
    ),
    "value read": (tampered(lambda steps: steps[3].update(reads=[8])), "step 3 (guest): reads", "came [7]"),
    "one bit more": (
        tampered(lambda steps: steps[4]["out"].update(dirty=[[2, 2]])),
        "step 4 (ioctl KVM_GET_DIRTY_LOG): dirty",
        "came [[2, 1]]",
    ),
    "longer bitmap": (
        tampered(lambda steps: steps[4]["out"].update(npages=65)),
        "step 4 (ioctl KVM_GET_DIRTY_LOG): bytes written to the bitmap",
        "expected 16, came 8",
    ),
    "missing exit": (
        tampered(lambda steps: steps[5]["exits"].append(mmio(0x2000_0002, is_write=1, data="00"))),
        "step 5 (guest): exit 2",
        "came none",
    ),
    "unexpected exit": (
        tampered(lambda steps: steps[5]["exits"].pop()),
        "step 5 (guest): exit 1",
        "expected none, came {'errno': '0', 'exit_reason': 'KVM_EXIT_MMIO'",
    ),
    "exit's data": (
        tampered(lambda steps: steps[5]["exits"][1]["mmio"].update(data="06")),
        "step 5 (guest): exit 1",
        "'data': '05'",
    ),
    "peek": (tampered(lambda steps: steps[6]["args"].update(got="0800")), "step 6 (host peek): got", "0700"),
    "concurrent step": (
        tampered(lambda steps: steps[7]["concurrent"][1]["args"].update(got="02")),
        "step 7.1 (host peek): got",
        "came 01",
    ),
    "done": (tampered(lambda steps: steps[9].pop("done")), "step 9 (guest): done", "came False"),
}

UNKNOWN: dict[str, Body] = {
    "unknown prot 'x'": {"host": "mprotect", "args": {"addr": HVA, "size": SIZE, "prot": "x"}},
    "unknown advice 'cold'": {"host": "madvise", "args": {"addr": HVA, "size": SIZE, "advice": "COLD"}},
    "unknown kind 'dax'": {"host": "mmap", "args": {"addr": HVA, "size": SIZE, "kind": "dax"}},
    "unknown argument of munmap: 'len'": {"host": "munmap", "args": {"addr": HVA, "size": SIZE, "len": 1}},
    "unknown word of guest: 'nmi'": {"guest": [["r", GPA, 1]], "reads": [0], "nmi": 1},
    "unknown part of an exit: 'hypercall'": {"guest": [], "exits": [{"errno": "0", "hypercall": {}}]},
    "unknown result: 'runs'": {**dirty(), "out": {"runs": []}},
    "no step made a file 'm'": {"host": "ftruncate", "args": {"memfd": "m", "size": 0}},
    "unknown host step 'mlock'": {"host": "mlock", "args": {"addr": HVA, "size": SIZE}},
    "unknown ioctl 'KVM_CREATE_IRQCHIP'": {"ioctl": "KVM_CREATE_IRQCHIP", "args": {}, "errno": 0},
    "unknown uffd step 'poison'": {"uffd": "poison", "addr": HVA},
    "unknown ring step 'drain'": {"ring": "drain", "entries": []},
    "unknown guest step 'halt'": {"guest": "halt"},
    "unknown access ['wrmsr', 1, 2]": {"guest": [["wrmsr", 1, 2]], "reads": []},
    "access ['r', 1]: not its operands": {"guest": [["r", 1]], "reads": []},
    "access ['or0']: not its operands": {"guest": [["or0"]], "reads": []},
    "unknown capability KVM_CAP_HYPERV": {
        "ioctl": "KVM_CHECK_EXTENSION",
        "args": {"cap": "KVM_CAP_HYPERV"},
        "errno": 0,
    },
    "unknown pointer 'odd'": {
        "ioctl": "KVM_GET_DIRTY_LOG",
        "args": {"slot": 1, "dirty_bitmap": "odd"},
        "errno": "EFAULT",
    },
    "unknown step: ['smi']": {"smi": 1},
    "the step has no 'size'": {"host": "munmap", "args": {"addr": HVA}},
    "no step saved $g": {
        "ioctl": "KVM_SET_USER_MEMORY_REGION2",
        "args": {**region(1)["args"], "guest_memfd": "$g"},
        "errno": 0,
    },
}


def write(path: Path, found: Any) -> Path:
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The story as it is, with each change, and with each unknown step; one kvmd for all."""
    stories = [sequence("story", STORY)]
    stories += [sequence(name, steps) for name, (steps, _, _) in TAMPERED.items()]
    stories += [sequence(name, [*STORY[:2], body]) for name, body in UNKNOWN.items()]
    path = write(tmp_path_factory.mktemp("cases") / "stories.json", {"meta": {}, "sequences": stories})
    return {outcome.case.name: outcome for outcome in trio.run(replay_all, load(path))}


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """As the command has it, for this test alone."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.reset_defaults()


def test_the_untampered_story_passes(outcomes: dict[str, Outcome]) -> None:
    assert [str(difference) for difference in outcomes["story"].differences] == []


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_answer_is_found_at_its_step(name: str, outcomes: dict[str, Outcome]) -> None:
    _, where, what = TAMPERED[name]
    assert len(outcomes[name].differences) == 1
    text = str(outcomes[name].differences[0])
    assert text.startswith(where)
    assert what in text


@pytest.mark.parametrize("said", UNKNOWN)
def test_a_word_it_does_not_know_is_named_and_is_no_wrong_answer(
    said: str, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[said]
    assert (outcome.differences, outcome.passed) == ([], False)
    assert outcome.unknown.startswith("step 2 (")
    assert said in outcome.unknown


def test_status_is_1_when_a_word_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = [sequence("story", STORY), sequence("odd", [*STORY[:2], {"smi": 1}])]
    assert main([str(write(tmp_path / "d.json", {"sequences": stories}))]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "NOT UNDERSTOOD d.json:odd: step 2 (['smi']): unknown step: ['smi']",
        "1 passed, 0 failed, 0 skipped, 1 not understood",
    ]


def test_what_differed_before_a_word_it_does_not_know_is_told_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = sequence("odd", [*TAMPERED["errno"][0], {"smi": 1}])
    assert main([str(write(tmp_path / "d.json", {"sequences": [odd]}))]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["NOT", "FAILED", "0"]


# Steps with the words of later recordings -> what kvmd must answer, which each story has right.
NEWER: dict[str, list[Body]] = {
    "internal": [
        region(1),
        {
            "guest": [["xchg", GPA, 8, 1]],
            "reads": None,
            "exits": [
                {**mmio(GPA), "mmio": {"phys_addr": GPA, "len": 8, "is_write": 0, "reply": "01" + 14 * "0"}},
                {
                    "errno": "0",
                    "exit_reason": "KVM_EXIT_INTERNAL_ERROR",
                    "internal": {"suberror": 1, "ndata": 4},
                },
            ],
            "done": False,
        },
    ],
    "immediate_exit": [
        *STORY[:2],
        {
            "guest": [["w", GPA, 1, 7]],
            "immediate_exit": 1,
            "reads": None,
            "exits": [
                {"errno": "EINTR", "exit_reason": "KVM_EXIT_IO", "io": {"direction": "out", "port": 16}}
            ],
            "done": False,
        },
        {"host": "peek", "args": {"addr": HVA, "n": 1, "got": "00"}},
        {"guest": "resume", "immediate_exit": 0, "reads": []},
        {"host": "peek", "args": {"addr": HVA, "n": 1, "got": "07"}},
    ],
    "pointers": [
        STORY[0],
        region(1, flags=1),
        {**dirty(), "args": {"slot": 1, "dirty_bitmap": "unaligned"}},
        {**dirty(), "args": {"slot": 1, "dirty_bitmap": "8_bytes_then_hole"}},
        {**dirty(), "args": {"slot": 1, "dirty_bitmap": "7_bytes_then_hole"}, "errno": "EFAULT"},
        {**region(1, size=0), "args": {**region(1, size=0)["args"], "argp": "32_bytes_then_hole"}},
        {
            "ioctl": "KVM_SET_USER_MEMORY_REGION2",
            "args": {**region(1)["args"], "argp": "32_bytes_then_hole"},
            "errno": "EFAULT",
        },
        {
            "ioctl": "KVM_SET_USER_MEMORY_REGION",
            "args": {**region(1)["args"], "argp": "bad"},
            "errno": "EFAULT",
        },
    ],
    "kinds": [
        {"host": "memfd", "args": {"name": "m", "size": SIZE}},
        *(
            {
                "host": "mmap_fixed",
                "args": {"addr": HVA, "size": SIZE, "prot": "w", "kind": kind, "memfd": "m"},
            }
            for kind in ("private_file", "file_shared", "shared_anon", "anon")
        ),
        {"host": "punch_hole", "args": {"memfd": "m", "offset": -1, "size": 1}, "errno": "EINVAL"},
        {"host": "punch_hole", "args": {"memfd": "m", "offset": 1, "size": (1 << 63) - 1}, "errno": "EFBIG"},
        {"host": "ftruncate", "args": {"memfd": "m", "size": -1}, "errno": "EINVAL"},
    ],
    "gmem": [
        {"ioctl": "KVM_CREATE_GUEST_MEMFD", "args": {"size": SIZE, "flags": 3}, "errno": 0, "save": "g"},
        {"host": "mmap", "args": {"addr": HVA, "size": SIZE, "prot": "rw", "kind": "gmem", "memfd": "$g"}},
        {
            "ioctl": "KVM_SET_USER_MEMORY_REGION2",
            "args": {**region(1, flags=4)["args"], "guest_memfd": "gmem", "guest_memfd_offset": 0},
            "errno": 0,
        },
        {"host": "write", "args": {"addr": HVA, "hex": "07"}},
        {"guest": [["r", GPA, 1]], "reads": [7]},
        {"host": "ftruncate", "args": {"gmem": "g", "size": SIZE}, "errno": "EINVAL"},
        {"host": "punch_hole", "args": {"memfd": "gmem", "offset": 0, "size": SIZE}},
        {"guest": [["r", GPA, 1]], "reads": [0]},
        {"host": "file_read", "args": {"memfd": "g", "offset": 0, "n": 1, "got": ""}, "errno": "EINVAL"},
    ],
    "gmem that is not mapped": [
        {"ioctl": "KVM_CREATE_GUEST_MEMFD", "args": {"size": SIZE, "flags": 0}, "errno": 0, "save": "g"},
        {"host": "mmap", "args": {**STORY[0]["args"], "kind": "gmem"}, "errno": "ENODEV"},
    ],
    "a capability without a name": [
        {"ioctl": "KVM_CHECK_EXTENSION", "args": {"cap": 136}, "errno": 0, "ret": 1},
        {"ioctl": "KVM_CHECK_EXTENSION", "args": {"cap": 9999}, "errno": 0, "ret": 0},
    ],
}


def test_the_words_of_later_recordings_are_played(tmp_path: Path) -> None:
    emulated = {"cpl": 0, "pt": "2M", "pte_dirty": True}
    sequences = [sequence(name, steps, guest=emulated) for name, steps in NEWER.items()]
    outcomes = trio.run(replay_all, load(write(tmp_path / "d.json", {"sequences": sequences})))
    said = {o.case.name: (o.unknown, [str(each) for each in o.differences]) for o in outcomes}
    assert said == dict.fromkeys(NEWER, ("", []))


SKIPPED = [
    sequence("shadow", [{"smi": 1}], shadow_only=True),
    sequence("one vendor", [{"smi": 1}], vendor="intel"),
]


MARKED: list[Body] = [
    *STORY[:4],
    {"ioctl": "KVM_SET_CPUID2", "args": {}, "errno": 0, "vendor": "intel"},
    {**dirty([5, 9]), "shadow_only": True},
    dirty(),
    {"guest": [["wrmsr", 1, 2]], "reads": [], "vendor": "amd"},
    {
        "guest": [["w", 0x2000_0000, 1, 0xAB]],
        "reads": [],
        "exits": [mmio(0x2000_0000, is_write=1, data="AB")],
    },
    {"host": "mprotect", "args": {"addr": HVA, "size": SIZE, "prot": "rwx"}},
    {"host": "mprotect", "args": {"addr": HVA - SIZE, "size": SIZE, "prot": "r"}, "errno": "ENOMEM"},
]


def test_a_marked_step_acts_but_is_not_asked(tmp_path: Path) -> None:
    """The marked GET took the bit: the next one finds none.  Hex and rights may be spelled otherwise."""
    path = write(tmp_path / "d.json", {"sequences": [sequence("marked", MARKED)]})
    [outcome] = trio.run(replay_all, load(path))
    assert [str(difference) for difference in outcome.differences] == []


def test_a_case_that_never_ends_leaves_kvmd_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "PATIENCE_S", 1.0)
    spins: list[Body] = [*STORY[:2], {"guest": [["spin_until_ne", GPA, 0]], "reads": []}]
    waits: list[Body] = [{"uffd": "open"}, {"uffd": "fault", "addr": HVA, "flags": []}]
    sequences = [sequence("spins", spins), sequence("waits", waits), sequence("story", STORY)]
    path = write(tmp_path / "d.json", {"sequences": sequences})
    outcomes = trio.run(replay_all, load(path))
    assert ["no end after 1 s" in str(each) for outcome in outcomes for each in outcome.differences] == [
        True,
        True,
    ]
    assert outcomes[2].passed


def test_status_is_0_when_all_that_ran_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = write(tmp_path / "d.json", {"sequences": [sequence("story", STORY), *SKIPPED]})
    cases = write(tmp_path / "m.json", [{"name": "region", "steps": [region(0, size=1 << 20)]}])
    assert main([str(sequences), str(cases), "-v"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "passed d.json:story",
        "skipped d.json:shadow: shadow_only",
        "skipped d.json:one vendor: vendor",
        "passed m.json:region",
        "2 passed, 0 failed, 2 skipped",
    ]


def test_status_is_1_when_a_case_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = [sequence(name, steps) for name, (steps, _, _) in TAMPERED.items()]
    path = write(tmp_path / "d.json", {"sequences": [*stories, sequence("story", STORY)]})
    assert main([str(path), "-k", "errno", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("passed", "failed", "skipped")} == {
        "passed": 0,
        "failed": 1,
        "skipped": 0,
    }
    [case] = found["cases"]
    assert (case["name"], case["result"]) == ("errno", "failed")
    assert case["differences"][0]["step"] == "2"


def test_status_is_1_when_nothing_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "d.json", {"sequences": SKIPPED})
    assert main([str(path)]) == 1
    assert capsys.readouterr().out == "0 passed, 0 failed, 2 skipped\n"


def test_status_is_1_when_kvmd_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "d.json", {"sequences": [sequence("story", STORY)]})
    assert main([str(path), "--kvmd-option=--no-such-option"]) == 1
    assert "kvmd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (3, "neither a list of cases nor an object"),
        ({"sequences": 3}, "neither a list of cases nor an object"),
    ],
)
def test_a_file_of_no_known_form_is_refused(
    found: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "odd.json", found)
    with pytest.raises(BadFile):
        load(path)
    assert main([str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (3, "case 0: step 0 (the case itself): not an object with a name"),
        ({"name": "a"}, "a: step 0 (the case itself): `steps` is not a list"),
        ({"name": "a", "steps": [3]}, "a: step 0 (the case itself): `steps` is not a list"),
        ({"name": "a", "steps": [], "guest": 3}, "`guest` is not an object"),
        ({"name": "a", "steps": [], "ring": "4K"}, "`ring` is neither a number nor null"),
    ],
)
def test_an_entry_that_is_no_case_fails_alone(
    entry: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "odd.json", {"sequences": [entry, sequence("story", STORY)]})
    assert main([str(path)]) == 1
    *differences, counts = capsys.readouterr().out.splitlines()
    assert said in differences[0]
    assert counts == "1 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize("text", [None, "{", "\0"])
def test_a_file_that_cannot_be_read_is_refused(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@given(st.sets(st.integers(0, 300)))
def test_runs_and_bitmap_say_the_same_pages(pages: set[int]) -> None:
    made = bitmap.from_runs([[page, 1] for page in pages], 300)
    assert {page for page in range(8 * len(made)) if made[page // 8] >> page % 8 & 1} == pages
    runs = bitmap.to_runs(made)
    assert [page for first, count in runs for page in range(first, first + count)] == sorted(pages)
    assert all(first + count < later for (first, count), (later, _) in pairwise(runs))
    assert bitmap.from_runs(runs, 300) == made


def test_written_is_counted_in_words() -> None:
    fill = bytes([bitmap.FILL])
    assert bitmap.written(fill * 64) == 0
    assert bitmap.written(bytes(8) + fill * 56) == 8
    assert bitmap.written(fill * 15 + bytes(1) + fill * 48) == 16
