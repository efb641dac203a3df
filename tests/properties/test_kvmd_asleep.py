"""The same machine, its lookups asleep while anybody else does anything: slots go, come back, log.

Planted bugs take what a lookup was for, from before its sleep, for what is there after it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.planted.plugin import Plants
from tests.properties.machine import SMALL_PAGES, RandomVm
from tests.properties.test_kvmd import SLOTS_OF_NOTE, SMALL_GFNS, L, S, random_step, ready

# -- anything, in any order ----------------------------------------------------------------------------


def sleepy_step(rig: RandomVm, random: Random) -> None:
    steps: tuple[tuple[float, Callable[[], None]], ...] = (
        (30, lambda: random_step(rig, random)),
        (4, lambda: rig.guest(random.randrange(2), random.choice(SMALL_GFNS), None, 0)),
        (4, lambda: rig.guest(random.randrange(2), random.choice(SMALL_GFNS), random.randbytes(8), 0)),
        (2, lambda: rig.set_slot(*random.choice(SLOTS_OF_NOTE), random.random() < 0.2)),
        (1, lambda: rig.log(random.randrange(3), random.random() < 0.7)),
        (1, lambda: rig.get_dirty_log(random.randrange(3))),
        (4, lambda: rig.wake(random.randrange(8))),
        (3, lambda: sleep_through(rig, random)),
    )
    rig.lookups.drowsy = 0.2
    random.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()


def sleep_through(rig: RandomVm, random: Random) -> None:
    """One access sleeps, before or after its lookup, until another operation has run to its end."""
    gfn, data = random.choice(SMALL_GFNS), random.choice((None, random.randbytes(8)))
    accesses: tuple[Callable[[], None], ...] = (
        lambda: rig.io_fault(gfn, data is not None),
        lambda: rig.guest(random.randrange(2), gfn, data, 0),
    )
    changes: tuple[Callable[[], None], ...] = (
        lambda: rig.set_slot(*random.choice(SLOTS_OF_NOTE), random.random() < 0.2),
        lambda: rig.log(0, random.random() < 0.7),
        lambda: rig.change(random.choice(("madvise_dontneed", "migrate", "munmap")), S, SMALL_PAGES),
    )
    rig.ack_all()
    rig.lookups.drowsy = random.choice((0.5, 1))
    random.choice(accesses)()
    rig.lookups.drowsy = 0
    random.choice(changes)()
    rig.ack_all()
    rig.wake(rig.lookups.sleepers - 1)


def soak(seed: int, steps: int, *, own: bool) -> RandomVm:
    rig, random = ready(seed, own=own), Random(seed)
    rig.set_slot(1, 0x200, 512, L, False)
    for _ in range(steps):
        sleepy_step(rig, random)
        rig.check()
    rig.finish()
    rig.check()
    return rig


def soak_all() -> None:
    for seed in range(12):
        soak(seed, 250, own=False)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_long_run_asleep_keeps_the_core_in_step_with_the_dicts(seed: int, own: bool) -> None:
    rig = soak(seed, 250, own=own)
    assert rig.lookups.slept > 5, "hardly anybody slept"
    assert rig.compared > 5, "the run read too little to mean anything"


# -- planted bugs --------------------------------------------------------------------------------------


def slot_goes_under(rig: RandomVm, access: Callable[[], None], anew: Callable[[], None]) -> None:
    """Slot 0 is deleted while the lookup of `access` sleeps; then comes what is made `anew`."""
    rig.lookups.drowsy = 1
    access()
    rig.lookups.drowsy = 0
    rig.set_slot(0, 0, 0, 0, False)
    rig.ack_all()
    anew()
    rig.finish()
    rig.check()


def elsewhere(rig: RandomVm) -> None:
    """The gfns are of another slot now, over other pages."""
    rig.set_slot(2, 0x100, SMALL_PAGES - 1, S + 1, False)


def emulated_store(rig: RandomVm) -> None:
    slot_goes_under(rig, lambda: rig.guest(0, 0x103, b"8 bytes!", 0), lambda: elsewhere(rig))
    rig.process(S + 3, None)
    rig.process(S + 4, None)


def store_of_cpu(rig: RandomVm) -> None:
    slot_goes_under(rig, lambda: rig.guest(0, 0x103, b"8 bytes!"), lambda: elsewhere(rig))


def store_while_it_goes(rig: RandomVm) -> None:
    rig.lookups.drowsy = 1
    rig.io_fault(0x103, True)
    rig.lookups.drowsy = 0
    rig.set_slot(0, 0, 0, 0, False)
    while rig.lookups.sleepers:
        rig.wake(0)
    rig.finish()
    rig.check()


def store_under_an_equal_slot(rig: RandomVm) -> None:
    rig.log(0, True)
    rig.ack_all()
    anew = rig.slots[0]
    slot_goes_under(rig, lambda: rig.guest(0, 0x103, b"8 bytes!"), lambda: rig.set_slot(0, *anew, log=True))


SCHEDULES: dict[str, tuple[Callable[[RandomVm], None], str]] = {  # and what says so
    "emulated-access-keeps-its-slot": (emulated_store, "the process reads"),
    "R21-slot-not-found-again": (store_of_cpu, "I5"),
    "R21-slot-that-goes": (store_while_it_goes, "I11"),
    "equal-slot": (store_under_an_equal_slot, r"I20.*I25"),
}


@pytest.mark.parametrize("bug", SCHEDULES)
def test_the_schedule_is_sound_without_the_bug(bug: str) -> None:
    SCHEDULES[bug][0](ready())


@pytest.mark.parametrize("bug", SCHEDULES)
def test_a_planted_bug_is_caught_by_a_schedule_written_out(bug: str, plant: Plants) -> None:
    plant(bug)
    schedule, says = SCHEDULES[bug]
    with pytest.raises(AssertionError, match=says):
        schedule(ready())


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("emulated-access-keeps-its-slot", r"was reached|reads|I25"),
        ("R21-slot-not-found-again", r"I5|I11|I20"),
    ],
)
def test_a_planted_bug_is_caught_by_a_long_run(bug: str, says: str, plant: Plants) -> None:
    """Not told where to look; the moments of the other two are too rare for it."""
    plant(bug)
    with pytest.raises(AssertionError, match=says):
        soak_all()
