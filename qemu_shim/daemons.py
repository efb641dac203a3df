"""The daemons of a system, described once: names, commands, and who needs whom.

The supervisor starts them from this table; compose.yaml says the same in its own words, and a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """`name` is also its socket's; `command` its console script; `peers` option -> daemon it connects to."""

    name: str
    command: str
    module: str
    peers: tuple[tuple[str, str], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.peers)

    def argv(self, directory: str) -> list[str]:
        """The command with its options, for sockets in `directory`."""
        options = [("--socket", self.name), *self.peers]
        return [
            self.command,
            *(part for option, name in options for part in (option, f"{directory}/{name}.sock")),
        ]


KVMD = DaemonSpec("kvmd", "kvmd", "kvmd")
DEVICE_SIM = DaemonSpec("device_sim", "device-sim", "device_sim")
IOMMUFDD = DaemonSpec("iommufdd", "iommufdd", "iommufdd", (("--kvmd", "kvmd"), ("--device", "device_sim")))

DAEMONS = (KVMD, DEVICE_SIM, IOMMUFDD)


def socket_of(spec: DaemonSpec, directory: Path) -> Path:
    return directory / f"{spec.name}.sock"
