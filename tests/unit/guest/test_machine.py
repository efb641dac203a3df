"""The emulator's command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from guest.__main__ import RUNS, main
from guest.failure import GuestError
from guest.image import INIT
from guest.machine import DEFAULT_RUNS, MachineOptions, command_line, emulator_command, kernel_arguments


def line(options: MachineOptions, *, interactive: bool = False) -> list[str]:
    return command_line(["qemu"], Path("/k"), Path("/i"), options, interactive=interactive)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_ram_is_shared_and_of_one_size() -> None:
    command = line(MachineOptions(ram_mib=512))
    assert value(command, "-object") == "memory-backend-memfd,id=ram,size=512M,share=on"
    assert value(command, "-m") == "512M"
    assert value(command, "-machine") == "q35,memory-backend=ram"


def test_the_kernel_is_told_what_to_run() -> None:
    words = kernel_arguments(MachineOptions(runs=("pci", "dma"), append=("dma_check.tests=3",))).split()
    assert "guest.run=pci,dma" in words
    assert "console=ttyS0" in words
    assert words[-1] == "dma_check.tests=3"


def test_what_can_be_asked_for_is_what_the_guest_can_do() -> None:
    known = set(re.findall(r"^run_(\w+)\(\)", INIT.read_text(), re.MULTILINE))
    assert known == {*RUNS, "shell"}
    assert set(DEFAULT_RUNS) <= RUNS.keys()


def test_what_nobody_can_do_is_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["boot", "--run", "pci,nonsense"])
    assert left.value.code == 2
    assert "'nonsense' is none of pci, idxd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [MachineOptions(append=("a b",)), MachineOptions(runs=("a\tb",)), MachineOptions(append=("",))]
)
def test_what_is_no_word_is_refused(options: MachineOptions) -> None:
    with pytest.raises(GuestError, match="no word for a kernel's command line"):
        kernel_arguments(options)


def test_each_device_is_a_function_behind_its_socket() -> None:
    command = line(MachineOptions(devices=(Path("/tmp/a,b.sock"), Path("/tmp/c.sock"))))
    devices = [json.loads(command[n + 1]) for n, word in enumerate(command) if word == "-device"]
    assert [device["socket"] for device in devices] == [
        {"path": "/tmp/a,b.sock", "type": "unix"},
        {"path": "/tmp/c.sock", "type": "unix"},
    ]
    assert {device["driver"] for device in devices} == {"vfio-user-pci"}


def test_a_person_gets_the_monitor_as_well() -> None:
    assert value(line(MachineOptions()), "-serial") == "stdio"
    assert value(line(MachineOptions(), interactive=True), "-serial") == "mon:stdio"


def test_the_emulator_runs_by_its_own_loader(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"no ld-linux-x86-64\.so\.2"):
        emulator_command(tmp_path)
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (libraries / "ld-linux-x86-64.so.2").touch()
    with pytest.raises(GuestError, match="no qemu-system-x86_64"):
        emulator_command(tmp_path)
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/qemu-system-x86_64").touch()
    command = emulator_command(tmp_path)
    assert command[0] == str(libraries / "ld-linux-x86-64.so.2")
    assert str(tmp_path / "usr/bin/qemu-system-x86_64") in command
    assert all(word.startswith(("-", str(tmp_path))) for word in command)
