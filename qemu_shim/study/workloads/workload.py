"""What a workload is: a name, one story told in steps, its parameters, and the coroutine that plays it.

A workload is played on a machine of any design and uses only what every design offers; what one of them
refuses it notes and goes on, or ends there.  The device and the guest do one thing at a time, unless what is
counted does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Param

Play = Callable[[Context], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Workload:
    """`options` start its daemons, by the daemon's name."""

    name: str
    summary: str
    play: Play
    params: Mapping[str, Param] = field(default_factory=dict)
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
