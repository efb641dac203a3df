"""`qemu-shim` as a person runs it: what it prints, its exit status, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.daemons import DAEMONS
from tests.integration.plain import Plain
from tests.integration.scratch import Scratch, scratched
from tests.kit.daemons import BIN, System, short_directory, system, until
from tests.oracle.dump import Dump
from tests.patience import WHOLE_RUN_S

COMPARISON = Path(__file__).parents[2] / "docs" / "results" / "comparison.json"
LONG_RUN = ["run", "unmap", "--rounds", "100000"]
RUNS = {
    "dmatest": "dmatest: dma0chan0-copy0: summary 5 tests, 0 failures",
    "dmatest-nobof": "dmatest: dma0chan0-copy0: summary 5 tests, 0 failures",
    "dsa-ops": "dsa1 not blocking: 10 operations",
    "sharing": "device writes the vCPU's half: 0 EPT violations, 0 page requests",
    "unmap": "20 rounds of migrate, DONTNEED, slot delete and re-add under DMA",
}


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


@pytest.mark.parametrize("scenario", RUNS)
def test_a_scenario_run_by_hand_says_that_it_held(scratch: Scratch, scenario: str) -> None:
    status, out, err = scratch.run("run", scenario)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == f"{scenario}: ok"
    assert any(line.startswith(RUNS[scenario]) for line in lines)
    rule = [n for n, line in enumerate(lines) if set(line.strip()) == {"-"}]
    assert len(rule) == 2
    table = dict(line.strip().split("   ", 1) for line in lines[rule[0] + 1 : rule[1]])
    assert int(table["EPT violations"]) > 0
    assert table["page requests / groups"].split(" / ")[0] != "0"


@pytest.mark.parametrize(
    "command", [["list"], ["list", "--json"], ["run", "sharing"], ["run", "sharing", "--json"]]
)
def test_a_full_disk_behind_what_it_says_is_a_sentence_and_a_failure(
    shared_system: System, command: list[str]
) -> None:
    attached = ["--attach", str(shared_system.directory)] if command[0] == "run" else []
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [BIN / "qemu-shim", *command, *attached], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ran.returncode, ran.stderr) == (1, "qemu-shim: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("scenario", RUNS)
def test_json_is_one_document(scratch: Scratch, shared_system: System, scenario: str) -> None:
    status, out, err = scratch.run("run", "--json", "--attach", str(shared_system.directory), scenario)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["scenario"], report["ok"], report["problems"]) == (scenario, True, [])
    assert (report["figures"]["io_faults"] > 0) is (scenario != "dmatest-nobof")


def test_options_reach_the_scenario_and_the_daemons(scratch: Scratch) -> None:
    status, out, _ = scratch.run("run", "--json", "--log-level", "debug", "sharing", "--pages", "10")
    assert status == 0
    assert json.loads(out)["figures"]["faults"] == 10


def test_the_design_is_chosen_with_the_scenario_or_refused(scratch: Scratch) -> None:
    status, out, _ = scratch.run("run", "--json", "--design", "mirror", "dmatest", "--ram-mib", "32")
    assert (status, json.loads(out)["figures"]["io_faults"]) == (0, 3)
    status, out, err = scratch.run("run", "unmap", "--design", "mirror")
    assert (status, out) == (2, "")
    assert "unmap cannot be played on design mirror; it can on: shared" in err


def test_list_names_every_scenario(scratch: Scratch) -> None:
    status, out, err = scratch.run("list")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == list(SCENARIOS)
    status, out, err = scratch.run("list", "--json")
    assert (status, err) == (0, "")
    assert [scenario["name"] for scenario in json.loads(out)] == list(SCENARIOS)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """More than a pipe holds, and the reader gone."""
    process = subprocess.Popen(
        [BIN / "qemu-shim", "compare", "--from", str(COMPARISON)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(WHOLE_RUN_S), process.stderr.read()) == (141, "")
    process.stderr.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "unmap", "--rounds", "0"],
        ["run", "sharing", "--pages", "x"],
        ["run", "sharing", "--design", "mirror"],
        ["run", "--design", "pinned", "memory"],
        ["run", "dmatest", "--design", "best"],
        ["inspect", "--gpa", "-1"],
        ["inspect", "--attach", "DIR"],
        ["inspect", "--admin", "PATH"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_status_2_and_starts_nothing(scratch: Scratch, arguments: list[str]) -> None:
    status, out, err = scratch.run(*arguments)
    assert (status, out) == (2, "")
    assert "usage: qemu-shim" in err


def test_a_scenario_that_cannot_be_played_is_status_1(scratch: Scratch) -> None:
    """On a unit that no KVM HWPT can be made for."""
    with system({"device_sim": ["--no-snoop-control"]}) as weak:
        status, out, err = scratch.run("run", "--attach", str(weak.directory), "dmatest")
        assert (status, err) == (1, "")
        assert "the remapping unit cannot walk this table" in out
        assert out.splitlines()[-1] == "dmatest: failed"
        status, out, _ = scratch.run("run", "--attach", str(weak.directory), "--json", "dmatest")
        assert (status, json.loads(out)["ok"]) == (1, False)


@pytest.mark.parametrize("victim", [spec.name for spec in DAEMONS])
def test_a_daemon_that_dies_fails_the_run(scratch: Scratch, victim: str) -> None:
    process = scratch.start(*LONG_RUN)
    scratch.wait_working()
    os.kill(scratch.daemon(victim), signal.SIGKILL)
    out, err = process.communicate(timeout=WHOLE_RUN_S)
    assert process.returncode == 1, (out, err)
    assert f"{victim} ended with status -9" in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_in_the_middle_of_a_run_is_status_130(
    scratch: Scratch, number: signal.Signals
) -> None:
    process = scratch.start(*LONG_RUN)
    scratch.wait_working()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=WHOLE_RUN_S)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: every daemon was stopped, nothing is left\n"


def test_interrupts_that_go_on_until_it_has_ended_change_nothing(scratch: Scratch) -> None:
    process = scratch.start(*LONG_RUN)
    scratch.wait_working()

    def ended() -> bool:
        os.killpg(process.pid, signal.SIGINT)
        return process.poll() is not None

    until(ended, "the run has ended", WHOLE_RUN_S)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: every daemon was stopped, nothing is left\n"


def test_an_interrupt_while_the_daemons_start_leaves_nothing(scratch: Scratch) -> None:
    process = scratch.start(*LONG_RUN)
    until(lambda: list(scratch.directory.glob("tdp-*")) != [], "the directory is made")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=WHOLE_RUN_S)
    assert process.returncode == 130


def test_when_qemu_shim_is_killed_the_daemons_notice(scratch: Scratch) -> None:
    process = scratch.start(*LONG_RUN)
    scratch.wait_working()
    process.kill()
    process.communicate(timeout=WHOLE_RUN_S)
    assert process.returncode == -signal.SIGKILL
    until(lambda: scratch.processes() == [], "every daemon has ended")
    left = list(scratch.directory.glob("tdp-*"))  # nobody was there to remove them
    assert {path.suffix for directory in left for path in directory.iterdir()} == {".log"}
    for directory in left:
        shutil.rmtree(directory)


def test_daemons_started_by_hand_serve_one_run_after_the_other(scratch: Scratch) -> None:
    with system({"kvmd": ["--ram", "4G"], "device_sim": ["--devices", "2"]}) as by_hand:
        for scenario in RUNS:
            status, out, err = scratch.run("run", "--attach", str(by_hand.directory), scenario)
            assert (status, err) == (0, "")
            assert out.splitlines()[-1] == f"{scenario}: ok"
            assert {path.name for path in by_hand.directory.glob("*.sock")} == {
                f"{spec.name}.sock" for spec in DAEMONS
            }
        statuses = by_hand.stop()
        assert statuses == {spec.name: 0 for spec in DAEMONS}
        assert list(by_hand.directory.glob("*.sock")) == []


def test_an_attached_run_interrupted_leaves_the_daemons_as_they_were(scratch: Scratch) -> None:
    with system() as by_hand:
        before = by_hand.all_fds()
        process = scratch.start("run", "--attach", str(by_hand.directory), *LONG_RUN[1:])
        peer = Plain.connect(by_hand.socket("device_sim"))
        until(lambda: peer.ask("STATS")[0]["devices"]["dsa0"]["work_descriptors"] > 50, "DMA is running")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=WHOLE_RUN_S)
        assert process.returncode == 130
        none = f"no daemon in {by_hand.directory} was stopped, what we had of them is given back"
        assert err == f"interrupted: {none}\n"
        peer.close()
        by_hand.wait_closed(before)


def test_who_attaches_to_nobody_hears_whom_it_waits_for(scratch: Scratch, tmp_path: Path) -> None:
    process = scratch.start("run", "--attach", str(tmp_path), "sharing")
    assert process.stderr is not None
    who = "kvmd, device_sim, iommufdd"
    told = f"waiting up to 60 s for {who}: no socket of theirs is in {tmp_path} yet"
    assert process.stderr.readline() == f"qemu-shim: {told}\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=WHOLE_RUN_S)
    assert process.returncode == 130
    assert "still run" not in err


NEEDS = {
    "coherency": ["start device-sim with --devices 4 --units 4", "--unit 3:no-scalable-mode"],
    "pinned": ["start device-sim with --fault-capability none"],
    "dsa-ops": ["start device-sim with --devices 2"],
    "partial-iopf": ["with --fault-capability partial", "start iommufdd with --fault-policy trust"],
}


def test_an_attached_run_of_what_these_daemons_cannot_show_names_the_options(scratch: Scratch) -> None:
    """Each used to end with ok, having shown nothing."""
    assert {name for name, scenario in SCENARIOS.items() if scenario.options} == set(NEEDS)
    with system() as plain:
        for name, wanted in NEEDS.items():
            status, out, err = scratch.run("run", "--attach", str(plain.directory), name)
            assert (status, err) == (1, "")
            assert all(words in out for words in wanted), out
            assert out.splitlines()[-1] == f"{name}: failed"


@pytest.mark.parametrize("name", NEEDS)
def test_an_attached_run_on_daemons_with_the_options_is_the_whole_run(scratch: Scratch, name: str) -> None:
    with system(SCENARIOS[name].options) as ready:
        status, out, err = scratch.run("run", "--attach", str(ready.directory), name)
        assert (status, err) == (0, ""), out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_daemon_stops_at_a_signal_with_status_0(number: signal.Signals) -> None:
    with system() as running:
        for name in reversed(running.names):
            running.signal(name, number)
        until(lambda: all(running.exited(name) for name in running.names), "every daemon has ended")
        assert list(running.directory.glob("*.sock")) == []


def test_a_daemon_whose_socket_is_taken_says_so(scratch: Scratch) -> None:
    with system(None, None, "kvmd") as first:
        second = subprocess.run(
            [str(BIN / "kvmd"), "--socket", str(first.socket("kvmd"))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2
        assert "a daemon listens there already" in second.stderr


def test_a_dump_of_a_run_is_written_wherever_its_option_stands(scratch: Scratch) -> None:
    with short_directory() as directory:
        status, _, err = scratch.run("run", "sharing", "--pages", "10", "--dump", str(directory / "a" / "b"))
        assert (status, err) == (0, "")
        assert Dump(directory / "a" / "b").mismatches() == []
        status, _, err = scratch.run("run", "--dump", str(directory), "sharing", "--pages", "10")
        assert (status, err) == (0, "")
        assert {path.name for path in directory.iterdir()} == {"a", "TABLES.bin", "TABLES.json"}


def test_inspect_starts_a_machine_of_its_own_if_it_is_given_none(scratch: Scratch) -> None:
    with short_directory() as directory:
        status, out, err = scratch.run("inspect", "--dump", str(directory))
        assert (status, err) == (0, "")
        for part in ("VM 1", "slot 0:0", "exported", "importers: iommufd", "hwpt did", "pages_4k"):
            assert part in out
        assert Dump(directory).mismatches() == []


def test_inspect_looks_at_daemons_that_run_and_at_one_address(scratch: Scratch) -> None:
    with system() as by_hand:
        attach = ("inspect", "--attach", str(by_hand.directory), "--admin", str(by_hand.admin))
        status, out, err = scratch.run(*attach)
        assert (status, out) == (1, "")
        assert "kvmd has no VM" in err
        running = scratch.start("run", "--attach", str(by_hand.directory), *LONG_RUN[1:])
        peer = Plain.connect(by_hand.socket("device_sim"))
        until(lambda: peer.ask("STATS")[0]["devices"]["dsa0"]["work_descriptors"] > 50, "DMA is running")
        peer.close()
        status, out, _ = scratch.run(*attach, "--json")
        seen = json.loads(out)
        assert (status, len(seen["vms"])) == (0, 1)
        assert seen["vm"]["slots_total"] in (1, 2)  # the run takes one away, again and again
        lines: list[str] = []

        def mapped() -> bool:
            """A slot that goes takes every leaf with it, until the next fault."""
            status, out, _ = scratch.run(*attach, "--gpa", "0x1000000")
            assert status == 0
            lines[:] = out.splitlines()
            return [line.split(" to ")[0] for line in lines[-2:]] == ["  cpu: mapped", "  unit: mapped"]

        until(mapped, "a page that the device uses all the time is mapped")
        assert [line.split()[1] for line in lines if line.startswith("  level")] == ["4", "3", "2", "1"]
        status, out, _ = scratch.run(*attach, "--gpa", "0x700000000")
        assert out.splitlines()[-2] == (
            "  cpu: absent, read EPT_VIOLATION 0x181, write EPT_VIOLATION 0x182, fetch EPT_VIOLATION 0x184"
        )
        assert out.splitlines()[-1] == "  unit: absent, read SSS_2, write SSS_2"
        status, _, err = scratch.run(*attach, "--vm", "77")
        assert status == 1
        assert "there is no VM 77" in err
        with short_directory() as directory:
            assert scratch.run(*attach, "--dump", str(directory))[0] == 0
            assert Dump(directory).mismatches() == []
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=WHOLE_RUN_S)
