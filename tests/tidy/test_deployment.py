"""compose.yaml and the supervisor start the same daemons, and compose confines them."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import yaml

from tests.tidy.source import ROOT

DIRECTORY = "/run/tdp"
USER = "10001:10001"
Service = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def socket_of(argv: list[str]) -> str:
    return argv[argv.index("--socket") + 1]


def started(services: dict[str, Service]) -> dict[str, tuple[list[str], set[str]]]:
    """What compose starts by default: command line and direct needs, by service."""
    return {
        name: (service["command"], set(service.get("depends_on", {})))
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
        "volumes": [f"sockets:{DIRECTORY}"],
    }
    wrong = {key: service.get(key) for key, value in required.items() if service.get(key) != value}
    refused = ("privileged", "cap_add", "ports", "devices", "pid", "ipc")
    return [
        *(f"{name}: {key} is {value!r}, not {required[key]!r}" for key, value in wrong.items()),
        *(f"{name}: has {key}" for key in refused if key in service),
    ]


def test_compose_starts_what_the_supervisor_starts(compose: dict[str, Any]) -> None:
    from qemu_shim.daemons import DAEMONS

    supervised = {daemon.name: (daemon.argv(DIRECTORY), set(daemon.needs)) for daemon in DAEMONS}
    assert started(compose["services"]) == supervised


def test_every_command_is_installed(compose: dict[str, Any]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    services = compose["services"].values()
    assert {service.get("entrypoint", service["command"])[0] for service in services} == set(scripts)


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
    for key in ("network_mode", "read_only", "user", "cap_drop", "security_opt", "init", "volumes"):
        loose = {name: value for name, value in tight.items() if name != key}
        assert len(confinement_complaints("kvmd", loose)) == 1, key
    assert confinement_complaints("kvmd", {**tight, "cap_add": ["SYS_ADMIN"]}) == ["kvmd: has cap_add"]


def test_only_the_daemons_user_can_reach_the_sockets(compose: dict[str, Any]) -> None:
    volume = compose["volumes"]["sockets"]["driver_opts"]
    assert volume["type"] == "tmpfs"
    uid, gid = USER.split(":")
    assert {f"uid={uid}", f"gid={gid}", "mode=0700", "nosuid", "nodev", "noexec"} <= set(
        volume["o"].split(",")
    )


def test_the_scenario_attaches_to_running_daemons(compose: dict[str, Any]) -> None:
    scenario = compose["services"]["scenario"]
    assert scenario["profiles"] == ["scenario"]
    assert scenario["entrypoint"] == ["qemu-shim", "run", "--attach", DIRECTORY]
    assert scenario["command"] == ["dmatest"]
    assert set(scenario["depends_on"]) == {"iommufdd"}


def test_every_service_is_built_from_the_same_settings(compose: dict[str, Any]) -> None:
    builds = [service["build"] for service in compose["services"].values()]
    assert all(build == builds[0] for build in builds)
    assert builds[0]["network"] == "${BUILD_NETWORK:-default}"
    assert builds[0]["args"] == {
        "PYTHON_BASE": "${PYTHON_BASE:-python:3.13-slim-trixie}",
        "PIP_NO_INDEX": "${PIP_NO_INDEX:-}",
    }
