"""The stories that are played while somebody is struck: short ones, of each design and each kind of path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import SHARED
from tests.patience import PATIENCE_S


@dataclass(frozen=True, slots=True)
class ShortStory:
    scenario: Scenario
    design: str
    params: Mapping[str, int] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        """As a command of `qemu-shim`."""
        options = [
            word for name, n in self.params.items() for word in (f"--{name.replace('_', '-')}", str(n))
        ]
        return [self.scenario.name, "--design", self.design, *options]


def _dmatest(design: str) -> ShortStory:
    return ShortStory(SCENARIOS["dmatest"], design, {"iterations": 1, "ram_mib": 64})


STORIES: dict[str, ShortStory] = {
    "sharing": ShortStory(SCENARIOS["sharing"], SHARED.name, {"pages": 4}),
    "unmap": ShortStory(SCENARIOS["unmap"], SHARED.name, {"pages": 2, "rounds": 2, "workers": 1}),
    "dmatest": _dmatest("shared"),
    "managed": _dmatest("managed"),
    "mirror": _dmatest("mirror"),
    "notifier": _dmatest("notifier"),
    # Little memory: all of it is pinned, and each frame is an allocation.
    "pinned": ShortStory(
        WORKLOADS["hotplug-storm"], "pinned", {"kept": 16, "plugged": 16, "rounds": 1, "storm": 0}
    ),
    "balloon": ShortStory(WORKLOADS["balloon"], "mirror", {"pages": 8, "rounds": 1}),
}
QUIET_S = PATIENCE_S / 6  # what was lost on its way never comes: a story may say so before it is given up
PROOF = "sharing"  # played after each blow: does everybody serve again?
