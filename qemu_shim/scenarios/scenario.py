"""What a scenario is: a name, one story, its parameters with defaults, and the coroutine that plays it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qemu_shim.scenarios.measure import Report
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import Host

Params = Mapping[str, Any]
Play = Callable[[Host, Params, Report], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Param:
    """A number the user may set; `low..high` inclusive."""

    default: int
    low: int
    high: int
    help: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """`tags` name the steps of the RFC, or the notes, it plays out; `options` start its daemons; `designs`
    are those it can be played on (`host.design`), the series' own behaviour on the series' own design.
    """

    name: str
    summary: str
    tags: tuple[str, ...]
    play: Play
    params: Mapping[str, Param] = field(default_factory=dict)
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    designs: tuple[str, ...] = (SHARED.name,)
