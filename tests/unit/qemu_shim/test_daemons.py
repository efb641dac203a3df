"""The table of daemons: commands as they are typed, and an order in which they can be started."""

from __future__ import annotations

from pathlib import Path

from qemu_shim.daemons import DAEMONS, DEVICE_SIM, IOMMUFDD, KVMD, socket_of


def test_the_commands_are_these() -> None:
    assert [" ".join(spec.argv("DIR")) for spec in DAEMONS] == [
        "kvmd --socket DIR/kvmd.sock",
        "device-sim --socket DIR/device_sim.sock",
        "iommufdd --socket DIR/iommufdd.sock --kvmd DIR/kvmd.sock --device DIR/device_sim.sock",
    ]


def test_a_socket_is_where_the_daemon_is_told_to_put_it() -> None:
    for spec in DAEMONS:
        assert spec.argv("some/where")[1:3] == ["--socket", str(socket_of(spec, Path("some/where")))]


def test_every_daemon_comes_after_those_it_needs() -> None:
    seen: set[str] = set()
    for spec in DAEMONS:
        assert set(spec.needs) <= seen
        seen.add(spec.name)
    assert (KVMD.needs, DEVICE_SIM.needs) == ((), ())
    assert IOMMUFDD.needs == ("kvmd", "device_sim")
