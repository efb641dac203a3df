"""What comes while a simulated process runs and is not its doing: a signal, and what a strategy raises."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import pytest

from qemu_shim.vmm.interrupt import SIGNALS
from simulator.kernel.process import SimProcess
from simulator.search.option import Option, UnrepeatableError
from simulator.world import system
from simulator.world.scheduler import World
from tests.unit.simulator.world.toys import Script, finish, made


@pytest.fixture(params=SIGNALS)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """It is a KeyboardInterrupt; workers of a test run ignore one."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_process_that_handles_whatever_there_is_sees_no_interrupt(number: int) -> None:
    world, seen = World(Script()), list[BaseException]()

    def body(process: SimProcess) -> None:
        try:
            signal.raise_signal(number)
        except Exception as error:
            seen.append(error)
        except KeyboardInterrupt as error:
            seen.append(error)

    made(world, a=body)
    with pytest.raises(KeyboardInterrupt):
        world.run(world.threads[0])
    assert not seen
    assert not world.failures
    assert signal.getsignal(number) is signal.default_int_handler
    world.close()


class Goes:
    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def test_an_interrupt_is_not_lost_in_a_finalizer_of_a_process(number: int) -> None:
    world = World(Script())

    def body(process: SimProcess) -> None:
        Goes(number)

    made(world, a=body)
    with pytest.raises(KeyboardInterrupt):
        world.run(world.threads[0])
    with system._unheard():
        world.close()


def test_nor_while_a_machine_that_was_cut_off_goes(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), system._unheard():
        Goes(number)


def test_a_signal_of_which_its_handler_only_takes_note_changes_nothing(number: int) -> None:
    came: list[int] = []
    signal.signal(number, lambda signum, _: came.append(signum))
    world, told = World(Script()), list[str]()

    def body(process: SimProcess) -> None:
        signal.raise_signal(number)
        world.point("goes on")
        told.append(process.name)

    made(world, a=body)
    finish(world)
    assert (came, told) == ([number], ["a"])


class RaisesOnce(Script):
    """Strategy: it raises at one place, and goes on if asked again, as one does whose error was handled."""

    def __init__(self, place: str) -> None:
        super().__init__("a: begins")
        self._place = place

    def _meets(self, options: Sequence[Option], does: str) -> None:
        if self._place in [f"{does} {option.label}" for option in options]:
            self._place = ""
            raise UnrepeatableError(does)

    def choose(self, options: Sequence[Option]) -> int:
        self._meets(options, "choose")
        return super().choose(options)

    def took(self, step: Option) -> None:
        self._meets([step], "took")
        super().took(step)


@pytest.mark.parametrize(
    "place",
    ["choose begins", "choose point", "choose red", "took begins", "took point", "took red", "took last"],
)
def test_what_the_strategy_raises_is_for_whoever_runs_the_world(place: str) -> None:
    world, seen = World(RaisesOnce(place)), list[Exception]()

    def body(process: SimProcess) -> None:
        for _ in range(2):
            try:
                world.point("point")
                world.pick("colour", ("red", "blue"))
                world.point("last")
            except Exception as error:
                seen.append(error)

    made(world, a=body, b=body)
    with pytest.raises(UnrepeatableError, match=place.split()[0]):
        finish(world)
    assert not seen
    assert not world.failures
    world.close()
