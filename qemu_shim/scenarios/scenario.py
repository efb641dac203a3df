"""What a scenario is: a name, one story, its parameters with defaults, and the coroutine that plays it.

It is played on a machine of a design, on daemons that were started with its options.  One that takes steps
(`Context.step`) is counted and can be compared (`qemu_shim/study/workloads`); it uses only what every design
offers, and what one of them refuses it notes and goes on, or ends there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qemu_shim.scenarios.context import Context
from qemu_shim.vmm.designs import DESIGNS

Play = Callable[[Context], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Param:
    """A number the user may set; `low..high` inclusive."""

    default: int
    low: int
    high: int
    help: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """`params` are numbers by name; `options` start its daemons, by the daemon's name; `designs` are those it
    can be played on, none named: any; `tags` name the steps of the RFC, or the notes, it plays out; `help` is
    the whole story.  Not `counted`: nothing is, and it ends without figures; VMs of its own may come and go.
    """

    name: str
    summary: str
    play: Play
    params: Mapping[str, Param] = field(default_factory=dict)
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    designs: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    help: str = ""
    counted: bool = True

    @property
    def playable(self) -> list[str]:
        """The designs it can be played on, in the order of DESIGNS."""
        return [name for name in DESIGNS if name in self.designs or not self.designs]

    def with_defaults(self, given: Mapping[str, int]) -> dict[str, int]:
        """All parameters.  LookupError: there is no such one; ValueError: it is out of bounds."""
        unknown = given.keys() - self.params.keys()
        if unknown:
            raise LookupError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        params = {name: given.get(name, param.default) for name, param in self.params.items()}
        for name, value in params.items():
            param = self.params[name]
            if not param.low <= value <= param.high:
                raise ValueError(f"{self.name}: {name} {value} is not in {param.low}..{param.high}")
        return params
