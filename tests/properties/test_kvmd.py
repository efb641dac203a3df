"""Any sequence of operations and acks keeps kvmd's core in step with the dicts; planted bugs do not.

The machine is in `tests/properties/machine.py`.  Each planted bug is first shown to be caught by a short
schedule written out, then by long runs, the worst of them by the machine too.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.planted.plugin import Plants
from tests.properties.machine import GFNS, LARGE, LARGE_PAGES, SMALL, SMALL_PAGES, RandomVm

S, L = SMALL >> 12, LARGE >> 12
GFN = st.one_of(
    st.integers(0x100, 0x100 + SMALL_PAGES), st.sampled_from([0x200, 0x201, 0x3FF, 0x400, 0x5FF, 0x600, GFNS])
)
DATA = st.binary(min_size=8, max_size=8)
MAYBE = st.one_of(st.none(), DATA)
RANGE = st.one_of(
    st.tuples(st.integers(S, S + SMALL_PAGES - 1), st.integers(1, SMALL_PAGES)),
    st.sampled_from([(L, 512), (L + 512, 512), (L, 1024), (S, SMALL_PAGES)]),
)
SLOT = st.sampled_from(
    [
        (0x100, SMALL_PAGES, S),
        (0x102, SMALL_PAGES, S),  # a move onto a part of itself
        (0x104, 2, S + 1),
        (0x200, 512, L),
        (0x200, 512, L + 1),  # not aligned alike: small leaves
        (0x200, LARGE_PAGES, L),
        (0x400, 512, L + 512),
        (0, 0, 0),
        (0, 0, 0),
    ]
)


class KvmdMachine(RuleBasedStateMachine):
    rig: RandomVm

    @initialize(seed=st.integers(0, 1 << 16), ready=st.sampled_from([True, True, True, False]))
    def begin(self, seed: int, ready: bool) -> None:
        self.rig = RandomVm(seed)
        if ready:
            for large in (False, True):
                self.rig.mmap(large)
            self.rig.set_slot(0, 0x100, SMALL_PAGES, S, False)
            self.rig.set_slot(1, 0x200, 512, L, False)
            self.rig.join()

    @rule(large=st.booleans())
    def mmap(self, large: bool) -> None:
        self.rig.mmap(large)

    @rule(what=st.sampled_from(["munmap", "madvise_dontneed", "migrate", "migrate"]), pages=RANGE)
    def change(self, what: str, pages: tuple[int, int]) -> None:
        self.rig.change(what, *pages)

    @rule(slot=st.integers(0, 2), where=SLOT, readonly=st.booleans(), log=st.booleans())
    def set_slot(self, slot: int, where: tuple[int, int, int], readonly: bool, log: bool) -> None:
        self.rig.set_slot(slot, *where, readonly, log=log)

    @rule(slot=st.integers(0, 2), on=st.booleans())
    def log(self, slot: int, on: bool) -> None:
        self.rig.log(slot, on)

    @rule(slot=st.integers(0, 2))
    def get_dirty_log(self, slot: int) -> None:
        self.rig.get_dirty_log(slot)

    @rule(drowsy=st.sampled_from([0.0, 0.3, 1.0]))
    def sleep_in_lookups(self, drowsy: float) -> None:
        self.rig.lookups.drowsy = drowsy

    @rule(which=st.integers(0, 7))
    def wake(self, which: int) -> None:
        self.rig.wake(which)

    @rule(offset=st.integers(0, 1))
    def realign(self, offset: int) -> None:
        realign(self.rig, offset)

    @rule(index=st.integers(0, 1), gfn=GFN, data=MAYBE, cpl=st.sampled_from([0, 3]))
    def guest(self, index: int, gfn: int, data: bytes | None, cpl: int) -> None:
        self.rig.guest(index, gfn, data, cpl)

    @rule(gfn=GFN, write=st.booleans())
    def io_fault(self, gfn: int, write: bool) -> None:
        self.rig.io_fault(gfn, write)

    @rule(index=st.integers(0, 1), gfn=GFN, data=MAYBE)
    def dma(self, index: int, gfn: int, data: bytes | None) -> None:
        self.rig.io_fault(gfn, data is not None)
        self.rig.dma(index, gfn, data)

    @rule(page=st.one_of(st.integers(S, S + SMALL_PAGES), st.sampled_from([L, L + 511, L + 512])), data=MAYBE)
    def process(self, page: int, data: bytes | None) -> None:
        self.rig.process(page, data)

    @rule()
    def join(self) -> None:
        self.rig.join()

    @rule(index=st.integers(0, 1), which=st.integers(0, 7))
    def ack(self, index: int, which: int) -> None:
        self.rig.ack(index, which)

    @rule()
    def ack_all(self) -> None:
        self.rig.ack_all()

    @rule(what=st.sampled_from(["madvise_dontneed", "migrate"]))
    def sleep_in_the_next_fault(self, what: str) -> None:
        self.rig.nap = what

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.finish()
            self.rig.check()


def run_machine(examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        KvmdMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_schedule_keeps_the_core_in_step_with_the_dicts() -> None:
    run_machine(20)


# -- the same operations, dealt by a seed: more of everything at once than hypothesis picks --------------

SMALL_GFNS = range(0x100, 0x100 + SMALL_PAGES + 1)
GFNS_OF_NOTE = (*SMALL_GFNS, *SMALL_GFNS, 0x200, 0x201, 0x3FF, 0x400, GFNS)
SLOTS_OF_NOTE = (
    (0, 0x100, SMALL_PAGES, S),
    (0, 0x102, SMALL_PAGES, S),
    (2, 0x300, 2, S + 1),
    (1, 0x200, 512, L),
    (1, 0x200, 512, L + 1),
    (0, 0, 0, 0),
    (2, 0, 0, 0),
)


def realign(rig: RandomVm, offset: int) -> None:
    """Slot 1 comes back with its frames aligned to its gfns, or not: huge leaf or small ones."""
    rig.ack_all()
    rig.set_slot(1, 0, 0, 0, False)
    rig.ack_all()
    rig.set_slot(1, 0x200, 512, L + offset, False)
    rig.dma(0, 0x201, None)  # finds nothing yet, and remembers the way there
    rig.io_fault(0x201, True)


def random_step(rig: RandomVm, random: Random) -> None:
    gfn, data = random.choice(GFNS_OF_NOTE), random.choice((None, random.randbytes(8)))
    first = random.randrange(S, S + SMALL_PAGES)
    large = random.random() < 0.1
    steps: tuple[tuple[float, Callable[[], None]], ...] = (
        (6, lambda: rig.io_fault(gfn, data is not None)),
        (8, lambda: rig.dma(random.randrange(2), gfn, data)),
        (9, lambda: rig.guest(random.randrange(2), gfn, data)),
        (5, lambda: rig.change("madvise_dontneed", *((L, 512) if large else (first, random.randint(1, 3))))),
        (3, lambda: rig.change("migrate", *((L, 512) if large else (first, random.randint(1, 3))))),
        (0.5, lambda: rig.change("munmap", first, random.randint(1, 3))),
        (2, lambda: rig.mmap(large)),
        (0.5, lambda: rig.set_slot(*random.choice(SLOTS_OF_NOTE), random.random() < 0.2)),
        (0.5, lambda: realign(rig, random.randrange(2))),
        (3, lambda: rig.process(first, data)),
        (4, lambda: rig.ack(random.randrange(2), random.randrange(8))),
        (0.3, rig.ack_all),
        (1, rig.join),
        (2, lambda: setattr(rig, "nap", random.choice(("madvise_dontneed", "migrate")))),
    )
    random.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()


def soak(seed: int, steps: int, *, own: bool = False) -> RandomVm:
    rig, random = ready(seed, own=own), Random(seed)
    rig.set_slot(1, 0x200, 512, L, False)
    for _ in range(steps):
        random_step(rig, random)
        rig.check()
    rig.ack_all()
    rig.check()
    return rig


def soak_all(*, own: bool = False) -> None:
    for seed in range(12):
        soak(seed, 200, own=own)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_long_run_keeps_the_core_in_step_with_the_dicts(seed: int, own: bool) -> None:
    rig = soak(seed, 200, own=own)
    assert rig.compared > 5, "the run read too little to mean anything"
    assert rig.overlapped > 0, "no two invalidations were ever out at once"


# -- planted bugs --------------------------------------------------------------------------------------


def ready(seed: int = 1, *, own: bool = False) -> RandomVm:
    rig = RandomVm(seed, own=own)
    rig.mmap(False)
    rig.mmap(True)
    rig.set_slot(0, 0x100, SMALL_PAGES, S, False)
    rig.join()
    touch(rig, 0x100)
    return rig


def touch(rig: RandomVm, gfn: int) -> None:
    rig.io_fault(gfn, True)
    rig.dma(0, gfn, b"8 bytes!")
    rig.check()


def overlapping(rig: RandomVm) -> None:
    rig.change("madvise_dontneed", S, 2)
    rig.change("migrate", S, 1)
    rig.check()


def drop(rig: RandomVm) -> None:
    rig.change("madvise_dontneed", S, 1)
    rig.check()


def sleep_then(rig: RandomVm) -> None:
    rig.nap = "madvise_dontneed"
    rig.ack_all()
    rig.guest(0, 0x101, b"8 bytes!")
    rig.check()


def fault_in_change(rig: RandomVm) -> None:
    rig.change("madvise_dontneed", S, 2)
    rig.guest(0, 0x100, b"8 bytes!")
    rig.ack_all()
    rig.check()


def huge_over_small(rig: RandomVm) -> None:
    rig.set_slot(1, 0x200, 512, L + 1, False)
    touch(rig, 0x201)
    rig.set_slot(1, 0, 0, 0, False)
    rig.ack_all()
    rig.set_slot(1, 0x200, 512, L, False)
    rig.dma(0, 0x201, None)
    rig.io_fault(0x201, True)
    rig.check()


SCHEDULES: dict[str, Callable[[RandomVm], None]] = {
    "B-18-drain-is-skipped": overlapping,
    "R4-acks-not-awaited": drop,
    "R1-sequence-stands": sleep_then,
    "R1-range-not-looked-at": fault_in_change,
    "R5-no-quarantine": huge_over_small,
    "R16-bit-11": drop,
    "importers-are-not-told": drop,
}
CAUGHT = {
    "B-18-drain-is-skipped": "I6",
    "R4-acks-not-awaited": "I6",
    "R1-sequence-stands": "I5",
    "R1-range-not-looked-at": "I5|I6",
    "R5-no-quarantine": "I7",
    "R16-bit-11": "I2",
    "importers-are-not-told": "I6",
}  # which invariant says so


@pytest.mark.parametrize("bug", SCHEDULES)
def test_the_schedule_is_sound_without_the_bug(bug: str) -> None:
    rig = ready()
    SCHEDULES[bug](rig)
    rig.ack_all()
    rig.check()


@pytest.mark.parametrize("bug", SCHEDULES)
def test_a_planted_bug_is_caught_by_a_schedule_written_out(bug: str, plant: Plants) -> None:
    plant(bug)
    with pytest.raises(AssertionError, match=CAUGHT[bug]):
        SCHEDULES[bug](ready())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bug", SCHEDULES)
def test_a_planted_bug_is_caught_by_a_long_run(bug: str, own: bool, plant: Plants) -> None:
    plant(bug)
    with pytest.raises(AssertionError, match=CAUGHT[bug]):
        soak_all(own=own)


def test_a_planted_bug_is_caught_by_the_machine(plant: Plants) -> None:
    plant("R4-acks-not-awaited")
    with pytest.raises(AssertionError, match=r"I6|I7"):
        run_machine(300, (Phase.generate,))
