"""KVM's notes: looks that never fault, one after the other, and lost without harm."""

from __future__ import annotations

import errno
from collections.abc import Callable

from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.notes import MAX_WAITING, Notes, follow
from protocol.flow import Wait
from protocol.units import LEVEL_2M, Gfn, Iova
from tests.kit.host_memory import FRAMES
from tests.unit.iommufdd.spaces import HVA, SUCCESS, Space, mapped, outcome, request

K4, M2 = 4 << 10, 2 << 20


class Noted(Space):
    """`beside`: the two count in one place, and are driven by its flows."""

    def __init__(self, beside: Noted | None = None) -> None:
        super().__init__(on_demand=True)
        if beside is not None:
            self.world, self.counts, self.ioas.counts = beside.world, beside.counts, beside.counts
        self.map(0, 16 * M2)
        self.hwpt_: HwptMirror = self.mirror()
        assert isinstance(self.ioas, IoasOnDemand)
        self.notes = Notes(self.ioas, self.world.flows.spawn)
        self.asked()

    @property
    def counted(self) -> tuple[int, int, int, int]:
        counts = self.counts
        return counts.notes, counts.notes_mapped, counts.notes_pending, counts.notes_lost


def test_a_note_maps_what_the_host_has_there_and_a_device_need_not_fault() -> None:
    space = Noted()
    space.host.fault_in(HVA + K4)
    space.notes.told(Gfn(1), 1)
    assert mapped(space.hwpt_) == [(K4, 1, FRAMES, True)]
    assert (space.asked(), space.counted) == (["look"], (1, 1, 0, 0))
    assert space.world.run(space.hwpt_.fault(request(K4))) == SUCCESS
    assert space.asked() == []


def test_a_note_of_a_page_that_is_gone_faults_nothing_in() -> None:
    space = Noted()
    space.notes.told(Gfn(1), 1)
    assert (mapped(space.hwpt_), space.host.pages, space.counted) == ([], {}, (1, 0, 0, 0))


def test_a_note_of_what_is_mapped_changes_nothing() -> None:
    space = Noted()
    space.world.run(space.hwpt_.fault(request(0)))
    space.asked()
    space.notes.told(Gfn(0), 1)
    assert (space.asked(), space.counted) == (["look"], (1, 0, 0, 0))


def test_a_note_of_a_huge_page_maps_one_leaf() -> None:
    space = Noted()
    space.host.page_size = M2
    space.host.fault_in(HVA + M2)
    space.notes.told(Gfn(512), 512)
    assert [leaf[:2] for leaf in mapped(space.hwpt_)] == [(M2, LEVEL_2M)]


def test_notes_outside_every_area_are_looked_at_by_nobody() -> None:
    space = Noted()
    space.notes.told(Gfn(1 << 40), 1)
    space.notes.told(Gfn((1 << 64) - 1), 1 << 18)
    assert (space.asked(), space.counted) == ([], (2, 0, 0, 0))


def test_notes_are_worked_off_in_order_and_are_pending_till_then() -> None:
    space = Noted()
    for n in range(3):
        space.host.fault_in(HVA + n * K4)
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    for gfn in range(3):
        space.notes.told(Gfn(gfn), 1)
    assert (space.asked(), space.counted) == (["look", "hop"], (3, 0, 3, 0))
    seen = []
    while space.counts.notes_pending:
        space.world.let_go()
        space.world.hold()
        seen.append(len(mapped(space.hwpt_)))
    assert (sorted(seen), space.counted) == (seen, (3, 3, 0, 0))


def test_notes_beyond_the_room_are_lost_and_nothing_else_is() -> None:
    space = Noted()
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    for gfn in range(MAX_WAITING + 5):
        space.notes.told(Gfn(gfn), 1)
    assert space.counted == (MAX_WAITING + 5, 0, MAX_WAITING, 5)
    space.world.let_go()
    assert space.counted == (MAX_WAITING + 5, 0, 0, 5)


def test_what_the_host_took_meanwhile_is_not_mapped() -> None:
    space = Noted()
    space.host.fault_in(HVA)
    hops = 0

    async def hop() -> None:
        nonlocal hops
        hops += 1
        if hops == 2:
            await space.host.give_up(HVA, HVA + K4)

    space.host.hop = hop
    space.notes.told(Gfn(0), 1)
    assert (mapped(space.hwpt_), space.counted) == ([], (1, 0, 0, 0))


def test_an_area_gone_under_a_look_is_not_mapped() -> None:
    space = Noted()
    space.host.fault_in(HVA)
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    space.notes.told(Gfn(0), 1)
    gone = space.world.start(space.ioas.unmap(Iova(0), 16 * M2))
    while space.counts.notes_pending or not gone.done:
        space.world.let_go()
    assert (mapped(space.hwpt_), space.counts.notes_mapped) == ([], 0)


def test_notes_of_two_ioases_that_are_looked_at_at_once_are_both_counted() -> None:
    """A look takes its time: the count that stood before it is not the one to add to."""
    one = Noted()
    two = Noted(beside=one)
    for space in (one, two):
        space.host.fault_in(HVA)
        space.host.hop = lambda: one.world._take("hop")
    one.world.hold()
    one.notes.told(Gfn(0), 1)
    two.notes.told(Gfn(0), 1)
    while one.counts.notes_pending:
        one.world.let_go()
    assert one.counts.notes_mapped == 2


def test_a_host_that_is_gone_loses_the_note_and_the_next_is_looked_at() -> None:
    space = Noted()
    space.host.errno = errno.ENODEV
    space.notes.told(Gfn(0), 1)
    space.host.errno = 0
    space.host.fault_in(HVA)
    space.notes.told(Gfn(0), 1)
    assert (len(mapped(space.hwpt_)), space.counted) == (1, (2, 1, 0, 1))


class Channel:
    """To a VM: opened when told to."""

    def __init__(self) -> None:
        self.opened: Wait[None] = Wait()
        self.hung_up = 0

    async def open(self) -> None:
        await self.opened

    def hang_up(self) -> None:
        self.hung_up += 1


def following(space: Noted) -> tuple[Channel, list[Callable[[], None]], Wait[None]]:
    channel, gone = Channel(), []

    def channel_of(on_note: object, on_gone: Callable[[], None]) -> Channel:
        gone.append(on_gone)
        return channel

    return channel, gone, space.world.start(follow(space.demand, channel_of, space.world.flows.spawn))


def test_an_ioas_destroyed_while_it_begins_to_follow_is_ebadf() -> None:
    space = Noted()
    space.destroy(space.hwpt_)
    channel, _, begun = following(space)
    space.world.run(space.ioas.destroy())
    channel.opened.set(None)
    space.world.flows.run_ready()
    assert outcome(begun.result) == errno.EBADF
    assert channel.hung_up


def test_one_vm_is_followed_until_it_goes_and_its_end_does_not_end_another() -> None:
    space = Noted()
    first, gone, begun = following(space)
    assert outcome(following(space)[2].result) == errno.EBUSY
    gone[0]()
    second, _, after = following(space)
    for channel in (first, second):
        channel.opened.set(None)
    space.world.flows.run_ready()
    assert (outcome(begun.result), outcome(after.result)) == (errno.EBADF, 0)
    assert space.demand.following is second
