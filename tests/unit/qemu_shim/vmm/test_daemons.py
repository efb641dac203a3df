"""The table of daemons: commands as they are typed, and an order in which they can be started."""

from __future__ import annotations

from pathlib import Path

from qemu_shim.vmm.daemons import DAEMONS, DEVICE_SIM, IOMMUFDD, KVMD, Places, socket_of

IMPORTERS, LINK = "DRIVERS/kvmd-importers.sock", "DRIVERS/device_sim-link.sock"
PLACES = Places(Path("DIR"), Path("DRIVERS"), Path("ADMIN"))


def test_the_commands_are_these() -> None:
    assert [" ".join(spec.argv(PLACES)) for spec in DAEMONS] == [
        f"kvmd --socket DIR/kvmd.sock --importer-socket {IMPORTERS} --admin-socket ADMIN/kvmd-admin.sock",
        f"device-sim --socket DIR/device_sim.sock --driver-socket {LINK}",
        f"iommufdd --socket DIR/iommufdd.sock --kvmd {IMPORTERS} --device {LINK}",
    ]


def test_a_socket_is_where_the_daemon_is_told_to_put_it() -> None:
    for spec in DAEMONS:
        assert spec.argv(PLACES)[1:3] == ["--socket", str(socket_of(spec, PLACES.clients))]


def test_every_daemon_comes_after_those_it_needs() -> None:
    seen: set[str] = set()
    for spec in DAEMONS:
        assert set(spec.needs) <= seen
        seen.add(spec.name)
    assert (KVMD.needs, DEVICE_SIM.needs) == ((), ())
    assert IOMMUFDD.needs == ("kvmd", "device_sim")
