"""A remapping unit that shares memory with its driver and says in it what cannot be: the link ends, nobody
dies.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from protocol.errors import UapiError
from protocol.units import PAGE_SIZE
from tests.integration.fake_silicon import RID, FakeSilicon, hostile, page_request
from tests.integration.fake_unit import FSTS, GSTS, IQERCD, IQH, PAGE, PQT, PRS, FakeUnit
from tests.kit.daemons import eventually
from tests.kit.refusals import refused
from tests.kit.vmm import Vmm

SEED = 20231202
IQE, ITE, BAD_TYPE = 1 << 4, 1 << 6, 3


def unit_of(fake: FakeSilicon) -> FakeUnit:
    assert fake.unit is not None
    return fake.unit


async def link_ends(fake: FakeSilicon, rig: Vmm) -> None:
    """What was made on it is gone, and iommufdd goes on."""

    async def attach() -> int:
        try:
            await rig.bound[1].attach(rig.hwpt_id)
        except UapiError as error:
            return error.errno
        return 0

    await eventually(attach, lambda number: number == errno.ENODEV, "the device is gone")

    async def hung_up() -> bool:
        return fake.unit is None

    await eventually(hung_up, bool, "the link hangs up")
    assert await rig.host.iommufdd.violations() == []
    fake.let_go()


def head_beyond(unit: FakeUnit) -> None:
    unit.show(IQH, PAGE, 8)
    unit.completion.signal()


def head_within(unit: FakeUnit) -> None:
    unit.show(IQH, unit.shows(IQH, 8) + 16, 8)
    unit.completion.signal()


def head_past_the_tail(unit: FakeUnit) -> None:
    unit.show(IQH, (unit.shows(IQH, 8) + 32) % PAGE, 8)
    unit.completion.signal()


def tail_beyond(unit: FakeUnit) -> None:
    unit.show(PQT, 1 << 63, 8)
    unit.page_request.signal()


def tail_within(unit: FakeUnit) -> None:
    unit.show(PQT, 8, 8)
    unit.page_request.signal()


def stopped_at_nothing(unit: FakeUnit) -> None:
    unit.show(IQERCD, BAD_TYPE, 8)
    unit.show(FSTS, IQE)
    unit.fault.signal()


def kick_is_full(unit: FakeUnit) -> None:
    """A driver that signals it would wait for ever."""
    os.set_blocking(unit.kick.fd, True)
    unit.loop.unregister(unit.kick.fd)
    unit.kick.drain()
    os.eventfd_write(unit.kick.fd, 2**64 - 2)
    unit.send(page_request(0, 1))
    unit.loop.register(unit.kick.fd, lambda _: None)


@pytest.mark.parametrize(
    "wrong",
    [
        head_beyond,
        head_within,
        head_past_the_tail,
        tail_beyond,
        tail_within,
        stopped_at_nothing,
        kick_is_full,
    ],
)
async def test_what_cannot_be_ends_the_link_and_nobody_dies(wrong: Callable[[FakeUnit], None]) -> None:
    async with hostile() as (fake, rig):
        wrong(unit_of(fake))
        await link_ends(fake, rig)


async def test_events_for_nothing_are_looked_at_and_that_is_all() -> None:
    async with hostile() as (fake, rig):
        unit = unit_of(fake)
        for n in range(50):
            for event in (unit.fault, unit.page_request, unit.completion):
                os.set_blocking(event.fd, True)  # nobody waits in a read either
                event.signal()
            fake.send(page_request(n * PAGE_SIZE, n))
            assert (await fake.wait_answers(n + 1))[n:] == [(RID, n, 0)]
        assert await rig.host.kvmd.violations() == []


async def test_status_bits_that_never_go_are_not_waited_for() -> None:
    """PPR, PRO and ITE show for ever: what is cleared stays cleared for the driver until the unit says so."""
    async with hostile() as (fake, rig):
        unit = unit_of(fake)
        unit.take_clears = lambda offset: 0  # type: ignore[method-assign]
        unit.show(PRS, 3)
        unit.show(FSTS, ITE)
        for _ in range(20):
            unit.fault.signal()
            unit.page_request.signal()
        await rig.bound[1].detach()
        assert await rig.host.iommufdd.violations() == []


async def test_a_detach_waits_for_a_unit_that_answers_nothing_until_it_has_let_go() -> None:
    """A unit that hangs up before its wait may walk on: its lease says when it does not (I13)."""
    async with hostile() as (fake, rig):
        unit = unit_of(fake)
        unit.obeys = False
        detached = rig.bound[1]

        async def drain_is_queued() -> bool:
            return unit.queued > 0

        is_detached = trio.Event()

        async def detach() -> None:
            await detached.detach()
            is_detached.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(detach)
            await eventually(drain_is_queued, bool, "the drain is in the ring")
            assert fake.link is not None
            fake.link.close()

            for _ in range(3):  # turns of a driver that has heard of it
                await rig.host.iommufdd.stats()
            await trio.testing.wait_all_tasks_blocked()  # an answer to `detach` came before these: it is read
            assert not is_detached.is_set()
            fake.let_go()
        assert await rig.host.iommufdd.violations() == []


def records_beyond(fake: FakeSilicon) -> None:
    fake.fro = PAGE - 63 * 16  # the last of 64 is behind the page


def two_of_one_name(fake: FakeSilicon) -> None:
    """An invalidation by requester id would reach one of them."""
    fake.functions, fake.step = 2, 0


def memory_without_number(fake: FakeSilicon) -> None:
    fake.memory = None


def memory_of_no_number(fake: FakeSilicon) -> None:
    fake.memory = 0


def asks_early(fake: FakeSilicon) -> None:
    fake.is_early = True


@pytest.mark.parametrize(
    "wrong", [records_beyond, two_of_one_name, memory_without_number, memory_of_no_number, asks_early]
)
async def test_what_no_unit_is_is_not_taken_for_one(wrong: Callable[[FakeSilicon], None]) -> None:
    async with hostile() as (fake, rig):
        assert fake.link is not None
        fake.link.close()
        await link_ends(fake, rig)
        wrong(fake)
        fake.lets_go = True
        with refused(errno.ENODEV):
            await rig.host.iommufdd.open_device(0)


async def test_fds_that_nobody_asked_for_are_closed() -> None:
    """I14: one that stays is one less for everybody else."""
    async with hostile() as (fake, rig):
        fake.gives = 7
        await rig.bound[1].detach()
        assert fake.link is not None
        fake.link.close()
        await link_ends(fake, rig)
        (await rig.host.iommufdd.open_device(0)).close()

        async def held() -> int:
            return fake.still_held()

        assert fake.asked.count("LINK") == 2
        await eventually(held, lambda count: not count, "what it gave is closed")
        fake.gives = 0


@pytest.mark.parametrize("seed", range(6))
async def test_registers_and_status_words_of_random_bytes_end_the_link_or_nothing(seed: int) -> None:
    chance = random.Random(SEED + seed)
    async with hostile() as (fake, rig):
        for _ in range(100):
            unit = fake.unit
            if unit is None:
                break
            at = chance.choice((GSTS, FSTS, IQH, IQERCD, PQT, PRS, chance.randrange(0, 2 * PAGE - 8)))
            unit.registers[at : at + 8] = chance.randbytes(8) if chance.random() < 0.5 else bytes(8)
            for event in (unit.fault, unit.page_request, unit.completion):
                if chance.random() < 0.5:
                    event.signal()
            await rig.host.iommufdd.stats()
        if fake.link is not None:
            fake.link.close()
        await link_ends(fake, rig)
