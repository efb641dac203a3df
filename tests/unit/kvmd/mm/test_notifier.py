"""Telling of a change: everybody who is there before the edit, whenever they came, and each once."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.notifier import Range, edit_notified
from kvmd.core.mm.reclaim import migrate
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Hva
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.kvmd import RW
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.mirrors import PAGE, PAGES, SIZE, MirroredPages


@dataclass(eq=False)
class SlowNotifier:
    """A notifier that answers when the test says so."""

    heard: list[str] = field(default_factory=list)
    acked: Wait[None] = field(default_factory=Wait)

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        self.heard.append("start")
        await self.acked

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self.heard.append("end")

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        return False


class ToldChange:
    """A change of one page, of which `edits` says how often it was made."""

    def __init__(self, notifiers: int = 1) -> None:
        self.rig = MirroredPages()
        self.mm = self.rig.mm
        self.mm.notifiers.clear()
        self.edits = 0
        self.slow = [SlowNotifier() for _ in range(notifiers)]
        self.mm.notifiers += self.slow
        self.over = self.rig.start(edit_notified([Range(self.mm, self.rig.hva, self.rig.at(1))], self.edit))

    def edit(self) -> int:
        self.edits += 1
        assert all(each.acked.done for each in self.slow), "I6: edited while somebody has it"
        return self.edits

    def registers(self) -> SlowNotifier:
        late = SlowNotifier()
        self.slow.append(late)
        self.mm.notifiers.append(late)
        return late

    def ack(self, slow: SlowNotifier) -> None:
        slow.acked.set(None)
        self.rig.flows.run_ready()


def test_the_edit_comes_when_all_have_acked_and_each_is_told_of_its_end_once() -> None:
    told = ToldChange(notifiers=3)
    for slow in told.slow:
        assert (told.edits, told.over.done) == (0, False)
        told.ack(slow)
    assert told.over.result() == 1
    assert [slow.heard for slow in told.slow] == [["start", "end"]] * 3


def test_who_registers_meanwhile_is_told_before_the_edit() -> None:
    told = ToldChange()
    late = told.registers()
    told.ack(told.slow[0])
    assert (late.heard, told.edits) == (["start"], 0)
    later = told.registers()
    told.ack(late)
    assert (later.heard, told.edits) == (["start"], 0), "and whoever comes while that one is told, too"
    told.ack(later)
    assert told.over.result() == 1
    assert [slow.heard for slow in told.slow] == [["start", "end"]] * 3


def test_who_registers_after_the_edit_is_told_nothing_of_it() -> None:
    told = ToldChange()
    told.ack(told.slow[0])
    assert (told.over.done, told.registers().heard) == (True, [])


def test_who_leaves_before_it_acked_is_waited_for() -> None:
    told = ToldChange()
    told.mm.notifiers.clear()
    assert not told.over.done
    told.ack(told.slow[0])
    assert (told.over.result(), told.slow[0].heard) == (1, ["start", "end"])


def test_an_edit_that_fails_is_over_for_everybody() -> None:
    told = ToldChange()

    def fails() -> int:
        raise UapiError(errno.ENOMEM, "no memory")

    told.ack(told.slow[0])
    assert errno_of(
        lambda: told.rig.run(edit_notified([Range(told.mm, told.rig.hva, told.rig.at(1))], fails))
    )
    assert told.slow[0].heard == ["start", "end"] * 2


# -- a mirror that registers meanwhile ---------------------------------------------------------------------


class Registering:
    """Two processes have a page; a change of it is told to the first one's mirror, and holds no lock of the
    second, whose mirror comes now.
    """

    def __init__(self) -> None:
        self.rig = MirroredPages()
        self.world = self.rig
        self.other: Mm = self.world.host.create_mm()
        self.ops = SlowImporter()
        self.mirror = Mirror(self.other)
        self.over: Wait[Any]

    def shared_by_fork(self) -> None:
        self.rig.write(0)
        self.rig.do(fork(self.rig.mm, self.other))
        self.hva = self.rig.hva
        self.over = self.world.start(migrate(self.rig.mm, self.hva, PAGE))

    def shared_by_file(self) -> None:
        rig, file = self.rig, MemoryFile(self.rig.memory, "both", SIZE)
        self.hva = Hva(1 << 40)
        for mm in (rig.mm, self.other):
            self.world.run(mm.mmap(self.hva, SIZE, RW, shared=True, file=file))
            self.world.run(mm.write(self.hva, b"both"))
        rig.mirror.watch(self.hva, PAGES * PAGE)
        self.over = self.world.start(file.punch_hole(0, PAGE))

    def registers(self) -> None:
        registered = self.world.start(self.mirror.register(self.ops, HandLease()))
        assert registered.done, "no lock of this process is held"
        self.mirror.watch(self.hva, PAGE)


@pytest.mark.parametrize("how", [Registering.shared_by_fork, Registering.shared_by_file])
def test_a_mirror_that_registers_while_a_change_is_announced_answers_what_is_there_after_it(
    how: Callable[[Registering], None],
) -> None:
    late = Registering()
    how(late)
    assert not late.over.done
    before = late.other.present_page(late.hva)
    assert before is not None
    late.registers()
    late.world.ack(late.rig.importer)
    assert [heard[:2] for heard in late.ops.heard] == [(late.hva, PAGE)], "told, for what it would answer now"
    look = late.world.start(late.mirror.range_fault(late.hva, PAGE, write=False, fault=False))
    assert (look.done, late.over.done, late.other.present_page(late.hva)) == (False, False, before)
    tag = late.rig.tag(before.pfn)
    late.world.ack(late.ops)
    assert late.over.done
    assert late.rig.tag(before.pfn) != tag, "given up, after both had acked"
    assert before.pfn not in [page.pfn for page in look.result().pages]


def test_a_mirror_that_registers_between_two_acks_is_waited_for() -> None:
    late = Registering()
    late.shared_by_fork()
    first, first_ops = Mirror(late.other), SlowImporter()
    late.world.run(first.register(first_ops, HandLease()))
    first.watch(late.hva, PAGE)
    late.world.ack(late.rig.importer)
    late.registers()
    late.world.ack(first_ops)
    assert (late.over.done, len(late.ops.pending)) == (False, 1)
    late.world.ack(late.ops)
    assert late.over.done
