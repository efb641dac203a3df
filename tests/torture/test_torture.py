"""A short part of the sweep, and a mistake for each judge that it must find."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torture import judges
from tests.torture.__main__ import again, parse, torture
from tests.torture.blow import PROCESSES, Aftermath, Blow, How, verdict
from tests.torture.calls import AT, ERRNOS, Fault
from tests.torture.daemons import ROOT, SPECS, Spawner
from tests.torture.holdings import Holdings, memory_of_the_dead, not_zero
from tests.torture.order import Order
from tests.torture.record import OtherCode, TriedBlows, table
from tests.torture.stories import STORIES
from tests.torture.struck import CountedCalls, plain
from tests.torture.summary import SweepRow, ended_of, rows_of, summary
from tests.torture.sweep import Bounds, StruckSystem, Sweep, run, sweeps

SHORT = Bounds(first=7, most=1)


@pytest.fixture(scope="module")
def world() -> Iterator[StruckSystem]:
    spawner = Spawner()
    made = StruckSystem(spawner)
    try:
        yield made
        assert not any(made.end().values())
    finally:
        made.end()
        spawner.close()


@pytest.mark.parametrize("victim", PROCESSES)
async def test_whoever_is_struck_the_others_serve_and_nothing_is_left(
    world: StruckSystem, victim: str
) -> None:
    """The whole of it is `make torture`."""
    record = TriedBlows(None)
    for sweep in sweeps(["sharing"], [victim], []):
        await run(sweep, SHORT, world, record, lambda blow, outcome: None)
    failed = {again(blow): outcome.why for blow, outcome in record.tried.items() if outcome.how is How.FAILED}
    assert not failed
    met = Counter(blow.fault for blow, outcome in record.tried.items() if outcome.call)
    assert met.keys() == {sweep.fault for sweep in sweeps(["sharing"], [victim], [])}


@pytest.mark.parametrize("victim", SPECS)
async def test_whatever_fails_at_the_start_of_a_daemon_it_says_so_or_serves(
    world: StruckSystem, victim: str
) -> None:
    record = TriedBlows(None)
    for sweep in sweeps(["start"], [victim], [Fault.FAIL]):
        await run(sweep, Bounds(first=7, step=13, most=3), world, record, lambda blow, outcome: None)
    assert record.tried
    assert [outcome.why for outcome in record.tried.values() if outcome.how is How.FAILED] == []


PLANTED = {
    Fault.LEAK_FD: "'fd /dev/null': 1",
    Fault.LEAK_MEMORY: "'map /memfd:leaked (deleted)': 1",
}


@pytest.mark.parametrize(
    ("victim", "fault"),
    [*((victim, Fault.LEAK_FD) for victim in SPECS), ("iommufdd", Fault.LEAK_MEMORY)],
)
async def test_a_leak_is_seen(
    world: StruckSystem, victim: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "PATIENCE_S", 0.5)
    outcome = await world.strike(Blow("sharing", victim, fault, 3))
    assert outcome.how is How.FAILED
    assert f"{victim} leaks" in outcome.why
    assert PLANTED[fault] in outcome.why


async def test_one_who_hangs_is_named(world: StruckSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_patience(monkeypatch)
    outcome = await world.strike(Blow("sharing", "iommufdd", Fault.HANG, 9))
    assert outcome.how is How.FAILED
    assert "the story never ends: iommufdd does not answer STATS" in outcome.why


async def test_an_answer_that_is_lost_is_a_story_that_never_ends(
    world: StruckSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_patience(monkeypatch)
    outcome = await world.strike(Blow("sharing", "kvmd", Fault.SILENT, 9))
    assert outcome.how is How.FAILED
    assert "one owes the VMM an answer" in outcome.why


def short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("blow", "doors", "judges"):
        monkeypatch.setattr(f"tests.torture.{module}.PATIENCE_S", 2.0)


# -- the judges alone ------------------------------------------------------------------------------------


def test_memory_whose_maker_is_dead_is_seen() -> None:
    ram, queues, own = (
        "/memfd:tdp-frames (deleted)",
        "/memfd:dmar-queues (deleted)",
        "/memfd:unit 0 (deleted)",
    )
    unit = Holdings(memory={"00:01:7": ram, "00:01:8": queues, "00:01:9": own})
    makers = {"kvmd": Holdings(memory={"00:01:7": ram}), "iommufdd": Holdings(memory={"00:01:8": queues})}
    assert memory_of_the_dead({"device_sim": unit, **makers}) == []
    (found,) = memory_of_the_dead({"device_sim": unit, "iommufdd": makers["iommufdd"]})
    assert ram in found
    (found,) = memory_of_the_dead(
        {"device_sim": unit, **makers, "iommufdd": Holdings(memory={"00:01:17": queues})}
    )
    assert queues in found


def test_what_is_not_zero_is_named() -> None:
    device = {"page_requests_outstanding": 2}
    kvmd = {"vm_count": 0, "processes": 0, "frames": 3, "table_pages": 0}
    assert not_zero("kvmd", kvmd) == {"frames": 3}
    assert not_zero("device_sim", {"devices": {"dsa0": device}}) == {"dsa0's page requests": 2}


def test_a_bug_is_seen_in_what_a_process_said() -> None:
    said = "level='error' event='bug'\nTraceback (most recent call last):\n  File\nValueError: x\n"
    assert judges.bugs(said) == ["met a bug: ValueError: x"]
    assert judges.bugs("level='warning' event='connection ends'\n") == []


def test_an_errno_alone_is_no_reason() -> None:
    bare = "kvmd: [Errno 12] Cannot allocate memory"
    assert judges.bare_errors(f"ready\n{bare}\n") == [f"tells nobody what was asked: {bare}"]
    assert judges.bare_errors("[Errno 1] cannot map it: [Errno 24] Too many open files")
    assert judges.bare_errors("[Errno 24] cannot copy an fd: Too many open files; raise the limit") == []


async def test_a_daemon_that_tells_an_errno_alone_is_seen(
    world: StruckSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "ERRNO", re.compile(r"\[Errno (\d+)\] cannot make .*?: (?=(.*))"))
    outcome = await world.strike(Blow("start", "kvmd", Fault.FAIL, 14))
    assert outcome.how is How.FAILED
    assert "tells nobody what was asked" in outcome.why


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ([], How.SURVIVED),
        (["[ENODEV] the remapping unit is gone"], How.REFUSED),
        (["kvmd hung up", "I6: pfn 7 written"], How.FAILED),
        (["destination page 3 holds foreign bytes"], How.FAILED),
        (["gpa 0x1000: 00 from byte 0 on, expected ff"], How.FAILED),
    ],
)
def test_a_reason_is_no_failure_and_a_lost_byte_is(said: list[str], how: How) -> None:
    assert verdict(said)[0] is how


def test_a_reason_does_not_hide_a_lost_byte_that_is_only_told() -> None:
    said = ["dmatest: 1 of 1 tests failed"]
    told = "dmatest: dma0chan0-copy0: result #1: '{}' with src_off=0x0 dst_off=0x0 len=0x1000 (8)"
    assert verdict(said, [told.format("test timed out")]) == (How.REFUSED, said[0])
    assert verdict(said, [told.format("data error")])[0] is How.FAILED


# -- orders and records ----------------------------------------------------------------------------------


def test_an_order_befalls_the_nth_call_of_its_kind_once(tmp_path: Path) -> None:
    driver, process = Order(tmp_path / "order"), Order(tmp_path / "order")
    assert process.at_call("send") is Fault.NOTHING
    driver.give(Fault.KILL_AFTER, 2)
    calls = ["send", "recvmsg", "dup", "eventfd write", "send"]
    assert [process.at_call(name) for name in calls] == [0, 0, 0, Fault.KILL_AFTER, 0]
    assert driver.met == "eventfd write"
    driver.give(Fault.FAIL, 1, errno_index=1)
    assert driver.met is None
    assert (process.at_call("send"), process.errno_of("send")) == (Fault.FAIL, errno.EPIPE)


def test_what_only_we_have_cannot_be_full_and_a_copy_may_be(tmp_path: Path) -> None:
    """An eventfd that nobody else has takes each signal; one that a peer has a copy of he may have filled."""
    order = Order(tmp_path / "order")
    os_ = plain(CountedCalls(order))
    fd = os_.eventfd(0, os.EFD_NONBLOCK)
    order.give(Fault.FAIL, 1)
    os_.eventfd_write(fd, 1)
    assert order.met is None
    order.withdraw()
    copy = os_.dup(fd)
    order.give(Fault.FAIL, 1)
    with pytest.raises(BlockingIOError):
        os_.eventfd_write(fd, 1)
    for each in (fd, copy):
        os.close(each)


@pytest.mark.parametrize("name", ["frame", "table page"])
async def test_an_allocation_that_fails_is_a_reason(world: StruckSystem, name: str) -> None:
    record = TriedBlows(None)
    (sweep,) = sweeps(["sharing"], ["kvmd"], [Fault.FAIL])
    for at in range(40, 80):
        await run(sweep, Bounds(at, last=at), world, record, lambda blow, outcome: None)
        if found := [outcome for outcome in record.tried.values() if outcome.call == name]:
            break
    assert {(outcome.how, "ENOMEM" in outcome.why) for outcome in found} == {(How.REFUSED, True)}


def test_every_call_can_be_died_at_and_every_one_that_can_fail_fails() -> None:
    assert AT[Fault.KILL] == AT[Fault.STOP] == ERRNOS.keys() - {"frame", "table page"}
    assert all(AT[fault] <= ERRNOS.keys() for fault in AT)
    assert all(ERRNOS[name] for name in AT[Fault.FAIL])


def test_a_record_goes_on_where_it_was_left_and_holds_for_one_state_of_the_code(tmp_path: Path) -> None:
    path, blow = tmp_path / "record", Blow("sharing", "kvmd", Fault.KILL, 4)
    outcome = Aftermath("send", How.REFUSED, "kvmd hung up")
    TriedBlows(path).add(blow, outcome)
    with path.open("a") as file:
        file.write('{"story": "shar')  # killed within the line
    assert TriedBlows(path).tried == {blow: outcome}
    assert "refused" in table({blow: outcome})
    path.write_text(json.dumps({"code": "of yesterday"}) + "\n")
    with pytest.raises(OtherCode, match="remove it"):
        TriedBlows(path)


def test_a_summary_has_a_row_of_each_sweep_and_goes_on_from_another(tmp_path: Path) -> None:
    def record(name: str, outcomes: dict[int, Aftermath]) -> Path:
        path = tmp_path / name
        kept = TriedBlows(path)
        for at, outcome in outcomes.items():
            kept.add(Blow("sharing", "kvmd", Fault.KILL, at), outcome)
        return path

    def row(*records: Path, known: dict[str, Any] | None = None) -> SweepRow:
        (found,) = rows_of(summary(records, known))
        return found

    good, none = Aftermath("send", How.REFUSED, "hung up"), Aftermath(None, How.SURVIVED)
    bad = Aftermath("dup", How.FAILED, "leaks")
    old, whole = record("old", {1: good, 2: bad}), record("whole", {1: good, 2: good, 3: none})
    found = row(old)
    assert (found.refused, found.failed, found.ended, found.calls) == (1, [2], False, {"dup": 1, "send": 1})
    found = row(old, whole)
    assert (found.refused, found.failed, found.ended, found.calls) == (2, [], True, {"send": 2})
    assert row(record("less", {1: good}), known=summary([whole])).ended, "what came further counts"
    assert row(whole, record("worse", {1: bad})).failed == [1], "what fails now is not hidden"
    assert row(record("mended", {2: good}), known=summary([old])).failed == []
    assert not row(record("gap", {1: good, 3: good, 4: none})).ended
    assert ended_of(summary([whole])) == {found.sweep}
    assert ended_of(summary([old])) == set()


def test_the_summary_that_documents_are_held_to_is_one_of_ours() -> None:
    path = ROOT / "docs" / "results" / "torture.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert summary([], written) == written, "rows of sweeps that there are, in their order"
    assert all(not row.failed and sum(row.calls.values()) == row.blows for row in rows_of(written))
    assert parse(["--known", str(path)]).known == written


def test_what_is_no_summary_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--known", "Makefile"])
    assert "Makefile is no --summary" in capsys.readouterr().err


async def test_what_another_run_has_ended_is_not_begun_again(tmp_path: Path) -> None:
    class Nothing(StruckSystem):
        async def strike(self, blow: Blow) -> Aftermath:
            begun.append(Sweep(blow.story, blow.victim, blow.fault))
            return Aftermath(None, How.SURVIVED)

    begun: list[Sweep] = []
    kept = TriedBlows(tmp_path / "record")
    kept.add(Blow("sharing", "kvmd", Fault.KILL, 1), Aftermath(None, How.SURVIVED))
    (tmp_path / "known").write_text(json.dumps(summary([tmp_path / "record"])), encoding="utf-8")
    spawner = Spawner()
    spawner.close()
    options = parse(["--story", "sharing", "--process", "kvmd", "--known", str(tmp_path / "known")])
    asked = await torture(options, TriedBlows(None), Nothing(spawner))
    assert asked - set(begun) == {Sweep("sharing", "kvmd", Fault.KILL)}


async def test_what_the_record_has_is_not_tried_again() -> None:
    class Nobody(StruckSystem):
        async def strike(self, blow: Blow) -> Aftermath:
            struck.append(blow.at)
            return Aftermath("send" if blow.at < 4 else None, How.SURVIVED)

    struck: list[int] = []
    spawner = Spawner()
    spawner.close()
    (sweep,) = sweeps(["sharing"], ["kvmd"], [Fault.KILL])
    record = TriedBlows(None)
    record.tried[Blow("sharing", "kvmd", Fault.KILL, 2)] = Aftermath("send", How.SURVIVED)
    await run(sweep, Bounds(), Nobody(spawner), record, lambda blow, outcome: None)
    assert struck == [1, 3, 4], "until a run meets nothing"


def test_the_line_that_repeats_a_blow_is_one_of_the_command() -> None:
    line = again(Blow("sharing", "qemu_shim", Fault.KILL_AFTER, 7)).split()[3:]
    options = parse(line)
    assert (options.story, options.process, options.kind) == (["sharing"], ["qemu_shim"], ["kill-after"])
    assert (options.first, options.last, options.record) == (7, 7, Path("torture.jsonl"))


@pytest.mark.parametrize("story", STORIES)
async def test_every_story_is_played_by_a_vmm_of_its_own(world: StruckSystem, story: str) -> None:
    assert STORIES[story].design in STORIES[story].scenario.playable
    far_behind_the_end = Blow(story, "qemu_shim", Fault.KILL, 1 << 20)
    assert await world.strike(far_behind_the_end) == Aftermath(None, How.SURVIVED)
