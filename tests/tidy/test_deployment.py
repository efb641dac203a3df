"""compose.yaml and the supervisor start the same daemons, and compose confines them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from qemu_shim.vmm.daemons import ADMIN, DAEMONS, Places
from tests.tidy.source import PRODUCT, ROOT

PLACES = Places(Path("/run/tdp"), Path("/run/tdp-drivers"), Path("/run/tdp-admin"))
USER = "10001:10001"
Service = dict[str, Any]
# Who is given which sockets: all there is to tell a client from a driver, where all have one user.
_CLIENTS, _DRIVERS, _ADMIN = "clients:/run/tdp", "drivers:/run/tdp-drivers", "admin:/run/tdp-admin"
VOLUMES = {
    "kvmd": {_CLIENTS, _DRIVERS, _ADMIN},
    "device_sim": {_CLIENTS, _DRIVERS},
    "iommufdd": {_CLIENTS, _DRIVERS},
    "scenario": {f"{_CLIENTS}:ro"},
    "inspect": {f"{_CLIENTS}:ro", f"{_ADMIN}:ro"},
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def socket_of(argv: list[str]) -> str:
    return argv[argv.index("--socket") + 1]


def words(name: str, service: Service) -> list[str]:
    """Of a daemon, whose command ends with the options of whoever starts it."""
    command: str = service["command"]
    *argv, last = command.split()
    assert last == f"${{{name.upper()}_OPTIONS:-}}"
    return argv


def started(services: dict[str, Service]) -> dict[str, tuple[list[str], set[str]]]:
    """What compose starts by default: command line and direct needs, by service."""
    return {
        name: (words(name, service), set(service.get("depends_on", {})))
        for name, service in services.items()
        if "profiles" not in service
    }


def confinement_complaints(name: str, service: Service) -> list[str]:
    """Everything a daemon must not be able to do, spelled out in its service."""
    required = {
        "network_mode": "none",
        "read_only": True,
        "user": USER,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
    }
    wrong = {key: service.get(key) for key, value in required.items() if service.get(key) != value}
    given = set(service.get("volumes", []))
    refused = ("privileged", "cap_add", "ports", "devices", "pid", "ipc")
    return [
        *(f"{name}: {key} is {value!r}, not {required[key]!r}" for key, value in wrong.items()),
        *(f"{name}: has {key}" for key in refused if key in service),
        *(f"{name}: is given {volume}" for volume in sorted(given - VOLUMES[name])),
        *(f"{name}: is not given {volume}" for volume in sorted(VOLUMES[name] - given)),
    ]


def test_compose_starts_what_the_supervisor_starts(compose: dict[str, Any]) -> None:
    supervised = {daemon.name: (daemon.argv(PLACES), set(daemon.needs)) for daemon in DAEMONS}
    assert started(compose["services"]) == supervised


def test_every_command_is_installed(compose: dict[str, Any]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    services = compose["services"].values()
    commands = [service.get("entrypoint") or service["command"].split() for service in services]
    assert {command[0] for command in commands} == set(scripts)


def lacking(containerfile: str, dockerignore: str) -> list[str]:
    """Packages of the product that an image would be built without."""
    copied = {line.split()[1] for line in containerfile.splitlines() if line.startswith("COPY ")}
    sent = {line.removeprefix("!") for line in dockerignore.splitlines() if line.startswith("!")}
    return [name for name in PRODUCT if name not in copied & sent]


def test_an_image_has_every_package_of_the_product() -> None:
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("Containerfile", ".dockerignore")]
    assert lacking(*files) == []


def test_a_package_that_an_image_lacks_is_seen() -> None:
    copied = "".join(f"COPY {name} ./{name}\n" for name in PRODUCT)
    sent = "".join(f"!{name}\n" for name in PRODUCT)
    assert lacking(copied, sent) == []
    assert lacking(copied.replace("COPY kvmd", "# kvmd"), sent) == ["kvmd"]
    assert lacking(copied, sent.replace("!protocol\n", "")) == ["protocol"]


def test_a_daemon_is_healthy_once_its_socket_is_there(compose: dict[str, Any]) -> None:
    for name, (argv, _) in started(compose["services"]).items():
        check = compose["services"][name]["healthcheck"]
        assert check["test"] == ["CMD", "test", "-S", socket_of(argv)], name
        # `start_interval` is refused by older engines; a short timeout fails on a starved machine.
        timing = {key: value for key, value in check.items() if key != "test"}
        assert timing == {"interval": "1s", "timeout": "10s", "retries": 60, "start_period": "30s"}, name


def test_every_need_is_waited_for(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for need, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, (name, need)
            assert "healthcheck" in compose["services"][need]


def test_every_service_is_confined(compose: dict[str, Any]) -> None:
    assert [found for item in compose["services"].items() for found in confinement_complaints(*item)] == []


def test_a_loose_service_is_seen(compose: dict[str, Any]) -> None:
    tight = compose["services"]["kvmd"]
    assert confinement_complaints("kvmd", tight) == []
    for key in ("network_mode", "read_only", "user", "cap_drop", "security_opt", "init"):
        loose = {name: value for name, value in tight.items() if name != key}
        assert len(confinement_complaints("kvmd", loose)) == 1, key
    client = compose["services"]["scenario"]
    more = {**client, "volumes": [*client["volumes"], _DRIVERS]}
    assert confinement_complaints("scenario", more) == [f"scenario: is given {_DRIVERS}"]
    assert len(confinement_complaints("scenario", {**client, "volumes": [_CLIENTS]})) == 2, (
        "it may write there"
    )
    assert confinement_complaints("kvmd", {**tight, "cap_add": ["SYS_ADMIN"]}) == ["kvmd: has cap_add"]


def test_only_the_daemons_user_can_reach_the_sockets(compose: dict[str, Any]) -> None:
    uid, gid = USER.split(":")
    for name, made in compose["volumes"].items():
        options = set(made["driver_opts"]["o"].split(","))
        assert made["driver_opts"]["type"] == "tmpfs", name
        assert {f"uid={uid}", f"gid={gid}", "mode=0700", "nosuid", "nodev", "noexec"} <= options, name


def test_the_scenario_attaches_to_running_daemons(compose: dict[str, Any]) -> None:
    scenario = compose["services"]["scenario"]
    assert scenario["profiles"] == ["scenario"]
    assert scenario["entrypoint"] == ["qemu-shim", "run", "--attach", str(PLACES.clients)]
    assert scenario["command"] == ["dmatest"]
    assert set(scenario["depends_on"]) == {"iommufdd"}
    inspect = compose["services"]["inspect"]
    attach = ["--attach", str(PLACES.clients), "--admin", str(ADMIN.path(PLACES))]
    assert inspect["entrypoint"] == ["qemu-shim", "inspect", *attach]


def test_every_service_is_built_from_the_same_settings(compose: dict[str, Any]) -> None:
    builds = [service["build"] for service in compose["services"].values()]
    assert all(build == builds[0] for build in builds)
    assert builds[0]["network"] == "${BUILD_NETWORK:-default}"
    assert builds[0]["args"] == {
        "PYTHON_BASE": "${PYTHON_BASE:-python:3.13-slim-trixie}",
        "PIP_NO_INDEX": "${PIP_NO_INDEX:-}",
    }
