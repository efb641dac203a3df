"""The way to a process's memory: its order, whose limit is charged, and that what fails leaves nothing."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from iommufdd.core.hmm import CallerMm, UserFd
from iommufdd.core.ioas import Ioas
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.qi import Descriptor
from protocol.units import PAGE_SIZE, Hva, Iova
from tests.kit.platform import MM, TwoNodes
from tests.unit.iommufdd.spaces import HVA, outcome

HERE = CallerMm(MM, UserFd(9))


def test_units_first_then_the_process_then_its_windows_and_only_then_its_pages() -> None:
    rig = TwoNodes()
    rig.ctx.connector.account = "mm"
    ioas = rig.ioas(on_demand=True)
    rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    assert rig.asked() == ["open", "register", "add_memory", "watch"]
    assert rig.mirrors[0].account == "mm"


@pytest.mark.parametrize("errno_", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_host_that_refuses_leaves_no_mirror(errno_: int) -> None:
    rig = TwoNodes()
    mirror_of = rig._mirror_of

    def refusing(*args: object) -> object:
        mirror = mirror_of(*args)  # type: ignore[arg-type]
        mirror.errno = errno_
        return mirror

    rig.ctx.connector._mirror_of = refusing  # type: ignore[assignment]
    call = rig.ioas().map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True)
    assert outcome(lambda: rig.run(call)) == errno_
    assert rig.mirrors[0].released


def test_units_that_go_meanwhile_leave_no_mirror() -> None:
    rig = TwoNodes()
    rig.hardware.fails.after(0, errno.ENODEV)
    call = rig.ioas().map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True)
    assert outcome(lambda: rig.run(call)) == errno.ENODEV
    assert rig.mirrors[0].released


def test_a_host_that_goes_empties_every_table_before_any_window_is_given_back() -> None:
    rig = TwoNodes()
    device = rig.bind()
    ioases = [rig.ioas() for _ in range(2)]
    hwpts = [rig.run(rig.paging(device, ioas)) for ioas in ioases]
    for ioas in ioases:
        rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.run(rig.nodes[0].attach(hwpts[0], pinned=False))
    rig.asked()
    rig.gone[0]()
    rig.hardware.flows.run_ready()
    assert [ioas.hwpts[0].table.leaves for ioas in ioases] == [[0, 0, 0, 0]] * 2
    assert device.hwpt is None
    assert rig.asked()[-1] == "remove_memory"
    assert outcome(lambda: rig.run(rig.nodes[0].attach(hwpts[1], pinned=False))) == errno.ENODEV


def test_a_host_that_goes_while_units_get_its_windows_leaves_none() -> None:
    """No IOAS maps anything of it yet, so nobody else would take them back."""
    rig = TwoNodes()
    rig.hardware.hold()
    ioas = rig.ioas()
    mapped = rig.start(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    assert rig.asked()[-1] == "add_memory"
    rig.gone[0]()
    rig.hardware.let_go()
    assert outcome(mapped.result) == errno.ENODEV
    assert (rig.asked(), rig.mirrors[0].released, ioas.sources) == (["remove_memory"], True, [])


def test_pages_that_were_lent_to_units_that_went_are_not_copied_before_those_that_came() -> None:
    """Those were never given their windows: DMA would end in no memory, or in a window another lent."""
    rig = TwoNodes()
    first, second = rig.ioas(), rig.ioas()
    rig.run(first.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.hardware.alive = False
    rig.nodes[0] = rig.open(0)
    device = rig.bind()
    assert outcome(lambda: rig.run(rig.paging(device, first))) == errno.ENODEV
    rig.run(rig.paging(device, second))
    slices = rig.run(first.slices(Iova(0), PAGE_SIZE))
    assert outcome(lambda: rig.run(second.map_slices(slices, Iova(0), writable=True))) == errno.ENODEV
    assert (second.hwpts[0].table.leaves, list(second.areas)) == ([0, 0, 0, 0], [])


@pytest.mark.parametrize("on_demand", [False, True])
def test_no_hwpt_is_made_of_what_a_host_that_went_left_mapped(on_demand: bool) -> None:
    """It had the areas of the IOAS, and none of their pages."""
    rig = TwoNodes()
    device, ioas = rig.bind(), rig.ioas(on_demand=on_demand)
    rig.run(rig.paging(device, ioas))
    rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.gone[0]()
    rig.hardware.flows.run_ready()
    assert outcome(lambda: rig.run(rig.paging(device, ioas))) == errno.ENODEV
    assert len(ioas.hwpts) == 1


def test_no_hwpt_is_made_while_the_host_goes() -> None:
    """Whoever takes devices off lost HWPTs would not find it."""
    rig = TwoNodes()
    device, ioas = rig.bind(), rig.ioas()
    first = rig.run(rig.paging(device, ioas))
    rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.run(rig.nodes[0].attach(first, pinned=False))
    rig.hardware.hold()
    rig.gone[0]()
    (leaving,), rig.hardware.held = rig.hardware.held or [], None
    second = rig.start(rig.paging(device, ioas))
    leaving.set(None)
    rig.hardware.flows.run_ready()
    assert outcome(second.result) == errno.ENODEV
    assert [hwpt.id for hwpt in ioas.hwpts] == [first]


def test_a_host_that_went_is_not_asked_for_the_same_process_again() -> None:
    """kvmd hung up and lives: another IOAS is connected anew, though the first still has areas."""
    rig = TwoNodes()
    for made in (1, 2):
        ioas = rig.ioas()
        rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
        assert len(rig.mirrors) == made
        rig.gone[-1]()
        rig.hardware.flows.run_ready()


def shown_twice(rig: TwoNodes) -> tuple[Ioas, Ioas]:
    """A page of an IOAS with an HWPT that a device is on, and a copy of it in an older one without."""
    device, copy, ioas = rig.bind(), rig.ioas(), rig.ioas()
    hwpt = rig.run(rig.paging(device, ioas))
    rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.run(rig.nodes[0].attach(hwpt, pinned=False))
    slices = rig.run(ioas.slices(Iova(0), PAGE_SIZE))
    rig.run(copy.map_slices(slices, Iova(0), writable=True))
    for piece in slices:
        rig.run(piece.pages.put())
    return ioas, copy


def test_what_a_host_that_goes_had_is_not_mapped_for_an_ioas_that_has_had_its_turn() -> None:
    """It is read back from a table that a device still walks, and nobody would empty this one."""
    rig = TwoNodes()
    _, copy = shown_twice(rig)
    rig.hardware.hold()
    rig.gone[0]()
    rig.hardware.flows.run_ready()
    (leaving,), rig.hardware.held = rig.hardware.held or [], None
    assert outcome(lambda: rig.run(rig.paging(rig.bind(1), copy))) == errno.ENODEV
    leaving.set(None)
    rig.hardware.flows.run_ready()
    assert (copy.hwpts, rig.asked()[-1]) == ([], "remove_memory")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_copy_that_waits_while_the_host_goes_shows_nothing(is_late: bool) -> None:
    """For the lock of its IOAS, or for the unit to forget what was there."""
    rig = TwoNodes()
    ioas, _ = shown_twice(rig)
    device, target = rig.bind(1), rig.ioas()
    rig.run(rig.nodes[1].attach(rig.run(rig.paging(device, target)), pinned=False))
    slices = rig.run(ioas.slices(Iova(0), PAGE_SIZE))
    if is_late:
        flush, waits = target.hwpts[0].flush, Wait[None]()

        async def flushes_late() -> None:
            await waits
            await flush()

        target.hwpts[0].flush = flushes_late  # type: ignore[method-assign]
        copying = rig.start(target.map_slices(slices, Iova(0), writable=True))
        rig.gone[0]()
        rig.hardware.flows.run_ready()
        waits.set(None)
    else:
        rig.run(target.lock.acquire(write=True))
        copying = rig.start(target.map_slices(slices, Iova(0), writable=True))
        rig.hardware.hold()  # the device of the first is taken off
        rig.gone[0]()
        target.lock.release()
        rig.hardware.flows.run_ready()
        rig.hardware.let_go()
    rig.hardware.flows.run_ready()
    assert outcome(copying.result) == errno.ENODEV
    assert (list(target.areas), target.hwpts[0].table.leaves) == ([], [0, 0, 0, 0])


def test_the_windows_of_a_host_that_goes_are_given_back_if_copies_alone_are_left() -> None:
    """Who maps memory of the process next is connected anew."""
    rig = TwoNodes()
    ioas, copy = shown_twice(rig)
    rig.run(rig.nodes[0].detach())
    rig.run(rig.ctx.destroy(ioas.hwpts[0].id))
    rig.run(rig.ctx.destroy(ioas.id))
    rig.asked()
    rig.gone[0]()
    rig.hardware.flows.run_ready()
    assert (rig.asked(), rig.mirrors[0].released) == (["remove_memory"], False)
    rig.run(rig.ioas().map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    assert len(rig.mirrors) == 2
    rig.run(rig.ctx.destroy(copy.id))
    assert rig.mirrors[0].released


def test_the_windows_of_another_process_stay_when_a_host_goes() -> None:
    rig = TwoNodes()
    both, other = rig.ioas(), CallerMm(MM + 1, UserFd(10))
    for n, mm in enumerate((HERE, other)):
        rig.run(both.map(mm, Hva(HVA), PAGE_SIZE, Iova(n * PAGE_SIZE), writable=True))
    rig.run(rig.ioas().map(other, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.asked()
    rig.gone[0]()
    rig.hardware.flows.run_ready()
    assert rig.asked() == ["remove_memory"]
    assert [source.lent for source in sorted(both.sources, key=lambda it: it.host is rig.mirrors[1])] == [
        False,
        True,
    ]


def test_what_a_unit_refuses_to_forget_is_kept_until_the_unit_is_gone() -> None:
    """Its domain id, its pages and their windows; and nothing else."""
    rig = TwoNodes()
    device, ioas, other = rig.bind(), rig.ioas(), rig.ioas()
    for each in (ioas, other):
        rig.run(rig.paging(device, each))
    rig.run(ioas.map(HERE, Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.run(rig.nodes[0].attach(ioas.hwpts[0].id, pinned=False))
    number = [errno.EIO]

    async def submit(descriptors: Sequence[Descriptor]) -> None:
        raise UapiError(number[0], "told to refuse")

    rig.hardware.submit = submit  # type: ignore[method-assign]
    rig.run(rig.nodes[0].detach())
    assert outcome(lambda: rig.run(rig.ctx.destroy(ioas.hwpts[0].id))) == errno.EIO
    for _ in range(2):
        assert outcome(lambda: rig.run(rig.ctx.release())) == errno.EIO
        assert list(rig.platform.hwpts) == [ioas.hwpts[0].domain.did]
        assert (rig.mirrors[0].released, len(rig.mirrors[0].pins), other.destroyed) == (False, 1, True)
    number[0] = errno.ENODEV
    rig.run(rig.ctx.release())
    assert (rig.platform.hwpts, rig.mirrors[0].released, rig.mirrors[0].pins) == ({}, True, {})
