"""The daemons of a system, described once: names, commands, who listens where, and who needs whom.

The supervisor starts them from this table; compose.yaml says the same in its own words, and a test
holds the two together.  Who may do what is said by where a socket lies (docs/decisions/0014).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Places:
    """The directories sockets lie in, one for each kind of peer that is given one."""

    clients: Path
    drivers: Path
    admin: Path


class Socket(NamedTuple):
    place: str  # of `Places`
    name: str

    def path(self, places: Places) -> Path:
        directory: Path = getattr(places, self.place)
        return directory / f"{self.name}.sock"


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """`name` is also its clients' socket's; `command` its console script; `listens` option -> socket, for the
    few; `peers` option -> (daemon, socket of it) it connects to.
    """

    name: str
    command: str
    module: str
    listens: tuple[tuple[str, Socket], ...] = ()
    peers: tuple[tuple[str, tuple[str, Socket]], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for _, (name, _) in self.peers)

    @property
    def sockets(self) -> list[tuple[str, Socket]]:
        """Every option that names one."""
        reached = [(option, socket) for option, (_, socket) in self.peers]
        return [("--socket", Socket("clients", self.name)), *self.listens, *reached]

    def argv(self, places: Places) -> list[str]:
        """The command with the options that say where sockets are."""
        words = (part for option, at in self.sockets for part in (option, str(at.path(places))))
        return [self.command, *words]


IMPORTERS, LINK = Socket("drivers", "kvmd-importers"), Socket("drivers", "device_sim-link")
ADMIN = Socket("admin", "kvmd-admin")

KVMD = DaemonSpec("kvmd", "kvmd", "kvmd", (("--importer-socket", IMPORTERS), ("--admin-socket", ADMIN)))
DEVICE_SIM = DaemonSpec("device_sim", "device-sim", "device_sim", (("--driver-socket", LINK),))
IOMMUFDD = DaemonSpec(
    "iommufdd",
    "iommufdd",
    "iommufdd",
    peers=(("--kvmd", ("kvmd", IMPORTERS)), ("--device", ("device_sim", LINK))),
)

DAEMONS = (KVMD, DEVICE_SIM, IOMMUFDD)


def socket_of(spec: DaemonSpec, directory: Path) -> Path:
    """Its clients' socket, in the directory clients are given."""
    return directory / f"{spec.name}.sock"
