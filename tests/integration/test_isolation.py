"""One client does not reach another's VM, with what a client is given, however the daemons are started.

What a client is given is directories of sockets, and the fds of its own VM.
"""

from __future__ import annotations

import errno
import mmap
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from qemu_shim.vmm.supervisor import supervised
from tests.integration.attacks import close_all
from tests.integration.plain import Plain
from tests.integration.test_hostile import a_vm, keep
from tests.kit.daemons import BIN, TRUSTING, short_directory, system, until
from tests.patience import PATIENCE_S
from tests.tidy.source import ROOT

SECRET = b"of another VM"
REFUSALS = {errno.EPERM, errno.ENOTTY}


def breaches(given: list[Path]) -> list[str]:
    """What a client that is given these directories comes by of another, whose VM runs meanwhile."""
    sockets = sorted(path for directory in given for path in directory.rglob("*") if path.is_socket())
    with ExitStack() as stack:
        number = _victim(stack, given[0] / "kvmd.sock")
        _, mm, vm = a_vm(stack, given[0] / "kvmd.sock")
        cpu = keep(stack, vm.open("KVM_CREATE_VCPU", {"vcpu_id": 0}))
        cpu.ask("KVM_SET_CPUID2", {"maxphyaddr": 46})
        tdp = keep(stack, vm.open("KVM_CREATE_TDP_FD", {"as_id": 0}))
        tries: list[tuple[str, dict[str, Any], list[int]]] = [
            ("TDP_FD_GET", {}, [tdp.sock.fileno()]),
            ("HMM_MIRROR_GET", {}, [mm.sock.fileno()]),
            ("LINK", {}, []),
            ("INSPECT", {"vm": number}, []),
            ("INSPECT_GPA", {"vm": number, "gpa": 0}, []),
            ("DUMP_TABLES", {"vm": number}, []),
        ]
        found = []
        for path in sockets:
            for op, body, fds in tries:
                door = keep(stack, Plain.connect(path))
                answer = door.ask(op, body, fds)
                if not (isinstance(answer, int) and answer in REFUSALS):
                    found.append(f"{path.name}: {op}")
                    close_all([] if isinstance(answer, int) else answer[1])
            stats = keep(stack, Plain.connect(path)).ask("STATS")
            if not isinstance(stats, int) and stats[0].get("vms"):
                found.append(f"{path.name}: STATS")
        return found


def _victim(stack: ExitStack, kvmd: Path) -> int:
    """Another client's VM, which has its secret in memory; its number."""
    _, mm, vm = a_vm(stack, kvmd)
    hva = mm.ask("MMAP", {"size": 4096})[0]["addr"]
    mm.ask("WRITE", {"addr": hva, "data": SECRET})
    cpu = keep(stack, vm.open("KVM_CREATE_VCPU", {"vcpu_id": 0}))
    cpu.ask("KVM_SET_CPUID2", {"maxphyaddr": 46})
    number: int = vm_number(kvmd, vm)
    return number


def vm_number(kvmd: Path, vm: Plain) -> int:
    door = Plain.connect(kvmd)
    number: int = door.ask("STATS", {}, [vm.sock.fileno()])[0]["vms"][0]["vm"]
    door.close()
    return number


async def test_a_client_of_the_supervisors_daemons_reaches_no_other_vm() -> None:
    async with supervised(log_level="warning") as running:
        assert breaches([running.directory]) == []
        assert {path.name for path in running.directory.iterdir()} == {
            "kvmd.sock",
            "device_sim.sock",
            "iommufdd.sock",
        }
        assert not running.admin.is_relative_to(running.directory)
        assert running.admin.stat().st_mode & 0o777 == 0o600


def test_a_client_of_compose_reaches_no_other_vm() -> None:
    with composed() as volumes:
        given = _given("scenario", volumes)
        assert [path.name for path in given] == ["clients"]
        assert breaches(given) == []
        assert breaches(_given("inspect", volumes)) != [], "who looks after the host does"


def test_what_is_looked_for_is_found_where_a_client_is_given_too_much() -> None:
    with composed() as volumes:
        found = breaches([volumes["clients"], volumes["drivers"], volumes["admin"]])
        assert {"kvmd-importers.sock: TDP_FD_GET", "kvmd-importers.sock: HMM_MIRROR_GET"} <= set(found)
        assert {"device_sim-link.sock: LINK", "kvmd-admin.sock: STATS"} <= set(found)
        assert {f"kvmd-admin.sock: {op}" for op in ("INSPECT", "INSPECT_GPA", "DUMP_TABLES")} <= set(found)
    with system(TRUSTING, None, "kvmd") as trusting:
        assert breaches([trusting.directory])[:2] == ["kvmd.sock: TDP_FD_GET", "kvmd.sock: HMM_MIRROR_GET"]
        assert "importers are trusted" in trusting.log("kvmd")


def test_an_importer_holds_every_vms_memory_in_its_hands() -> None:
    """Why importing is refused: what one mirror is lent has the memory of everybody else, to be written."""
    with system(TRUSTING, None, "kvmd") as running, ExitStack() as stack:
        _victim(stack, running.socket("kvmd"))
        door, mm, _ = a_vm(stack, running.socket("kvmd"))
        mirror = keep(stack, door.open("HMM_MIRROR_GET", {}, [mm.sock.fileno()]))
        body, fds = mirror.ask("HMM_REGISTER")
        frames = [fd for (kind, _, _), fd in zip(body["windows"], fds, strict=False) if kind == "frames"]
        with mmap.mmap(frames[0], 1 << 20) as window:
            assert window.find(SECRET) >= 0
        close_all(fds)


# -- compose, its containers as processes ------------------------------------------------------------------


@contextmanager
def composed() -> Iterator[Mapping[str, Path]]:
    """The daemons as compose.yaml starts them, each volume a directory, by name."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    with short_directory() as directory:
        names = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
        volumes = {name: directory / name for name in names}
        for path in volumes.values():
            path.mkdir(mode=0o700)
        running = []
        try:
            for service in services.values():
                if "profiles" not in service:
                    *command, _ = service["command"].split()  # the last are the options of who starts it
                    argv = [_inside(part, service["volumes"], volumes) for part in command]
                    log = (directory / f"{argv[0]}.log").open("wb")
                    with log:
                        running.append(subprocess.Popen([BIN / argv[0], *argv[1:]], stderr=log))
                    until(Path(argv[argv.index("--socket") + 1]).exists, f"{argv[0]} is ready")
            yield volumes
        finally:
            for process in reversed(running):
                process.terminate()
            assert [process.wait(PATIENCE_S) for process in running] == [0] * len(running)


def _inside(part: str, given: list[str], volumes: Mapping[str, Path]) -> str:
    """A path in a container, outside it."""
    for volume in given:
        name, where = volume.split(":")[:2]
        if part.startswith(f"{where}/"):
            return str(volumes[name] / part.removeprefix(f"{where}/"))
    assert not part.startswith("/"), f"{part} is in no volume of {given}"
    return part


def _given(service: str, volumes: Mapping[str, Path]) -> list[Path]:
    loaded = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return [volumes[volume.split(":")[0]] for volume in loaded[service]["volumes"]]
