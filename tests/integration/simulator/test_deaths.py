"""The ghost beside daemons that die: what they had is reached by nobody once the others have been told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from device_sim.core.root_complex import RootComplex
from iommufdd.core.platform import Platform
from protocol.errors import PeerError
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import Host
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes import processes
from simulator.ghost.probes.watching import SEAMS, watching
from simulator.ghost.violation import Verdicts
from simulator.world.fate import Fate
from simulator.world.system import system
from tests.integration.simulator.drawn import SMALL, Drawn

DAEMONS = ("kvmd", "iommufdd", "device_sim")


def play(ghost: Ghost, design: str, victim: str, step: int) -> None:
    """A VMM under which a daemon dies, and another when that one is there again."""

    async def work(host: Host) -> None:
        await run_scenario(host, SCENARIOS["unmap"], DESIGNS[design], 1, SMALL["unmap"], Report("unmap"))

    with watching(ghost) as watch, system(Drawn(step), fates={victim: Fate(step)}) as made:
        with suppress(PeerError):
            made.world.run(made.client(work))
        assert made.restart() == [victim]
        made.world.run(made.client(work))
        made.stop()
        watch.settled()


@pytest.mark.parametrize("victim", DAEMONS)
@pytest.mark.parametrize("design", ["shared", "mirror"])
@pytest.mark.parametrize("step", [200, 450])
def test_nothing_is_found_when_a_daemon_dies(victim: str, design: str, step: int) -> None:
    ghost = Ghost(Verdicts())
    play(ghost, design, victim, step)
    assert ghost.verdicts.found == []
    assert ghost.heard.now > 100


async def _lost_and_walked_on(platform: Platform, hwpt: Any) -> None:
    hwpt.maintained = False


def _unplugged_and_kept(silicon: RootComplex) -> None:
    silicon.driver = None
    silicon._connected.clear()


@pytest.mark.parametrize(
    ("victim", "seam", "mistake"),
    [
        ("kvmd", (Platform, "lose_kvm"), _lost_and_walked_on),
        ("iommufdd", (RootComplex, "unplug"), _unplugged_and_kept),
    ],
    ids=["nobody-is-detached", "the-link-s-end-is-ignored"],
)
def test_who_goes_on_with_what_the_dead_one_had_is_found(
    victim: str, seam: tuple[type, str], mistake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*seam, mistake)
    verdicts = Verdicts()
    for step in (300, 500, 700):
        with suppress(Exception):  # of a product that is broken now
            play(Ghost(verdicts), "shared", victim, step)
    assert "R28" in {violation.invariant for violation in verdicts.found}


def test_each_seam_of_processes_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: set[tuple[type, str]] = set()
    for seam, around in processes.seams.items():

        def hears(*args: Any, seam: tuple[type, str] = seam, around: Any = around, **named: Any) -> Any:
            heard.add(seam)
            return around(*args, **named)

        monkeypatch.setitem(SEAMS, seam, hears)
    for victim, design, step in (
        ("kvmd", "shared", 700),
        ("iommufdd", "shared", 700),
        ("iommufdd", "mirror", 450),
    ):
        play(Ghost(Verdicts()), design, victim, step)
    assert heard == set(processes.seams)
