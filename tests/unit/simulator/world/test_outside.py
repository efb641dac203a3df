"""A signal that comes while a simulated process runs is none of its doing, and none is lost on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from qemu_shim.vmm.interrupt import SIGNALS
from simulator.kernel.process import SimProcess
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
