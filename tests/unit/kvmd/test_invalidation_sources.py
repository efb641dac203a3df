"""Every source of invalidation: what becomes of the leaf, which range importers are told, who is first, and
that the frame outlives the last ack.  docs/invalidation.md has a line for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.mm.failure import poison
from kvmd.core.mm.fork import fork
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint
from kvmd.core.mm.thp import split
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.mm.vma import Prot
from kvmd.core.slots.dirty_log import ClearDirtyLog
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.spte import MMIO_GENERATION_MASK
from kvmd.core.vm import Kvm, VmType
from protocol.units import PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva, Level
from tests.unit.kvmd import sources as leaf
from tests.unit.kvmd.sources import GFN, PAGE, PAGES, REGION, SLOT, WHOLE, Flow, Used

BITMAP = 0x3000_0000_0000
ALL = PAGES * PAGE_SIZE
PROTECTED = {"kind": VmType.SW_PROTECTED}
NO_AD = CpuFeatures(ept_ad_bits=False)


@dataclass(frozen=True)
class SourceCase:
    """`told`: the ranges importers hear; `becomes`: the leaf, once they were told; `frees`: its frame."""

    act: Callable[[Used], Flow]
    told: Sequence[tuple[int, int]]
    becomes: Callable[[int, int], bool] = leaf.zapped
    frees: bool = False
    memory: str = "small"
    rig: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Used], None] = lambda rig: None


async def now(call: Callable[[], object]) -> None:
    """What nobody has to wait for."""
    call()


def mergeable(rig: Used) -> None:
    rig.run(rig.advise("mergeable", None, ALL))


def write_protects(rig: Used) -> Flow:
    uffd = Userfaultfd(rig.mm, user_mode_only=False)
    rig.run(uffd.register(rig.hva, ALL, missing=False, wp=True))
    return uffd.writeprotect(rig.hva, PAGE_SIZE, on=True)


def region(flags: int = 0, gfn: int = GFN, pages: int = PAGES) -> Callable[[Used], Flow]:
    def act(rig: Used) -> Flow:
        return rig.vm.slots_change.set_memory_region(
            rig.region(0, gfn, pages, rig.hva if pages else 0, flags)
        )

    return act


def near_the_wrap(rig: Used) -> None:
    rig.vm.slots.generation = MMIO_GENERATION_MASK


def maps_a_bitmap(rig: Used) -> None:
    rig.map(1, hva=BITMAP)
    rig.run(rig.mm.write(Hva(BITMAP), b"\xff" * 64))


def clears_by_hand(rig: Used) -> None:
    maps_a_bitmap(rig)
    enable_cap(rig.vm, KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, [1])


def is_protected(rig: Used) -> None:
    maps_a_bitmap(rig)
    over = rig.start(rig.vm.dirty_log.get(0, Hva(BITMAP)))
    rig.ack_all()
    assert over.done


def has_small_leaves(rig: Used) -> None:
    """Write tracking split the huge leaf, and is over."""
    for change in (rig.vm.write_track.add, rig.vm.write_track.remove):
        rig.start(change(Gpa(GFN << 12)))
        rig.ack_all()


def fetches(rig: Used) -> None:
    rig.start(rig.vm.nx_huge.switch(on=True))
    rig.ack_all()
    assert rig.run(rig.cpu.run([("exec", GFN << 12)])).done
    assert rig.io_fault(rig.exported, GFN) in (FaultResult.FIXED, FaultResult.SPURIOUS)
    assert rig.entry() & 0x84 == 4, "small and executable"


def split_ahead(rig: Used) -> Flow:
    span = GfnSpan.of_pages(Gfn(GFN), PAGES)
    return now(lambda: tdp_mmu.split(rig.vm.mmu, rig.exported.root, span, Level(1)))


async def released_and_destroyed(rig: Used) -> None:
    rig.exported.unregister_importer("unit", rig.importer)
    await rig.vm.exports.close(rig.exported)
    await rig.vm.destroy()


def of_page(call: Callable[..., Flow]) -> Callable[[Used], Flow]:
    return lambda rig: call(rig.mm, rig.hva, PAGE_SIZE)


def advice(name: str, size: int = PAGE_SIZE) -> Callable[[Used], Flow]:
    return lambda rig: rig.advise(name, None, size)


SOURCES: dict[str, SourceCase] = {
    # -- the host's memory: the mmu notifier --
    "munmap": SourceCase(of_page(Mm.munmap), [WHOLE], frees=True),
    "migrate": SourceCase(of_page(migrate), [WHOLE], frees=True),
    "swap": SourceCase(advice("pageout"), [WHOLE], frees=True),
    "ksm": SourceCase(lambda rig: merge(rig.mm, rig.hva, ALL), [WHOLE], before=mergeable),
    "punch hole": SourceCase(
        lambda rig: rig.file.punch_hole(0, PAGE_SIZE), [WHOLE], frees=True, memory="file"
    ),
    "truncate": SourceCase(lambda rig: rig.file.truncate(0), [WHOLE], frees=True, memory="file"),
    "balloon": SourceCase(advice("dontneed"), [WHOLE], frees=True),
    "madvise free": SourceCase(advice("free"), [WHOLE]),
    "mremap": SourceCase(
        lambda rig: mremap(rig.mm, rig.hva, PAGE_SIZE, PAGE_SIZE, Hva(0x2100_0000_0000)), [WHOLE]
    ),
    "mprotect": SourceCase(lambda rig: rig.mm.mprotect(rig.hva, PAGE_SIZE, Prot.READ), [WHOLE]),
    "fork": SourceCase(lambda rig: fork(rig.mm, rig.host.create_mm()), [WHOLE]),
    "thp collapse": SourceCase(advice("collapse", ALL), [WHOLE], frees=True),
    "thp split": SourceCase(lambda rig: split(rig.mm, rig.hva, ALL), [WHOLE], memory="thp"),
    "userfaultfd-wp": SourceCase(write_protects, [WHOLE]),
    "numa hint": SourceCase(of_page(numa_hint), [WHOLE]),
    "memory failure": SourceCase(of_page(poison), [WHOLE]),
    "exit": SourceCase(lambda rig: rig.mm.exit(), [WHOLE], frees=True),
    "clear-flush-young": SourceCase(of_page(age), [WHOLE], leaf.unaccessed),
    "clear-flush-young without A/D": SourceCase(
        of_page(age), [WHOLE], leaf.absent_but_remembered, rig={"features": NO_AD}
    ),
    # -- memslots and what a gfn is --
    "memslot delete": SourceCase(region(pages=0), [WHOLE]),
    "memslot move": SourceCase(region(gfn=0x1000), [WHOLE]),
    "memslot create": SourceCase(
        lambda rig: rig.vm.slots_change.set_memory_region(rig.region(1, 0x2000, 1, rig.hva)),
        [],
        leaf.same,
    ),
    "mmio generation wrap": SourceCase(
        lambda rig: rig.vm.slots_change.set_memory_region(rig.region(1, 0x2000, 1, rig.hva)),
        [],
        leaf.same,
        before=near_the_wrap,
    ),
    "nx huge pages": SourceCase(lambda rig: rig.vm.nx_huge.switch(on=True), [WHOLE], memory="huge"),
    "nx recovery": SourceCase(lambda rig: rig.vm.nx_huge.recover(), [WHOLE], memory="huge", before=fetches),
    "zap gfn range": SourceCase(
        lambda rig: rig.vm.host_changes.zap_gfn_range(Gpa(GFN << 12), PAGE_SIZE), [PAGE]
    ),
    "memory attributes": SourceCase(
        lambda rig: rig.vm.private.set_attributes(Gpa(GFN << 12), PAGE_SIZE, 0, 0), [WHOLE], rig=PROTECTED
    ),
    "guest_memfd hole": SourceCase(
        lambda rig: rig.vm.private.punch_hole(rig.memfd, 0, PAGE_SIZE), [WHOLE], frees=True, rig=PROTECTED
    ),
    "guest_memfd close": SourceCase(
        lambda rig: rig.vm.private.close(rig.memfd), [WHOLE], frees=True, rig=PROTECTED
    ),
    # -- dirty logging and the size of leaves --
    "logging on": SourceCase(region(1), [SLOT], leaf.small_protected, memory="huge"),
    "log get": SourceCase(
        lambda rig: rig.vm.dirty_log.get(0, Hva(BITMAP)),
        [SLOT],
        leaf.protected,
        rig={"flags": 1},
        before=maps_a_bitmap,
    ),
    "log clear": SourceCase(
        lambda rig: rig.vm.dirty_log.clear(ClearDirtyLog(0, PAGES, 0, Hva(BITMAP))),
        [SLOT],
        leaf.protected,
        rig={"flags": 1},
        before=clears_by_hand,
    ),
    "eager split": SourceCase(split_ahead, [], leaf.small, memory="huge"),
    "logging off": SourceCase(region(0), [REGION], leaf.frozen, memory="huge", rig={"flags": 1}),
    "huge leaf over a table": SourceCase(
        lambda rig: rig.device_fault(GFN), [REGION], leaf.huge, memory="huge", before=has_small_leaves
    ),
    "write-protect one gfn": SourceCase(
        lambda rig: rig.vm.write_track.add(Gpa(GFN << 12)), [PAGE], leaf.tracked, memory="huge"
    ),
    # -- the end, and what is none --
    "vm destroy": SourceCase(released_and_destroyed, []),
    "tdp fd release": SourceCase(lambda rig: rig.vm.exports.close(rig.exported), [], leaf.same),
    "not present to present": SourceCase(lambda rig: rig.device_fault(GFN + 1), [], leaf.same),
    "permission raised": SourceCase(
        lambda rig: rig.device_fault(GFN),
        [],
        leaf.writable_again,
        rig={"flags": 1},
        before=is_protected,
    ),
}


def behaves(source: SourceCase) -> None:
    rig = Used(source.memory, **source.rig)
    source.before(rig)
    rig.importer.heard.clear()
    rig.importer.cpu_had_it.clear()
    if source.told:
        assert rig.guest_read(rig.cpu, GFN << 12, 5).done, "the CPU has it in its TLB"
    entry, frame = rig.entry(), rig.frame
    tag = rig.tag(frame)
    over = rig.start(source.act(rig))
    assert source.becomes(entry, rig.entry()), f"the leaf was {entry:#x} and is {rig.entry():#x}"
    assert [told[:2] for told in rig.importer.heard] == list(source.told), "ranges told"
    assert not any(rig.importer.cpu_had_it), "the CPU could still use it when the importer was told"
    assert over.done == (not source.told), "it returns with the last ack, not before"
    assert rig.tag(frame) == tag or not source.told, "the frame is gone and somebody may still use it"
    rig.ack_all()
    assert over.done
    assert (rig.tag(frame) != tag) == source.frees, "the frame is given back"
    assert check_vm(rig.vm) + check_memory(rig.host.memory, rig.host.processes) == []


@pytest.mark.rfc("RFC-87", "RFC-88", "RFC-94")
@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str) -> None:
    behaves(SOURCES[name])


# -- that the suite would notice -------------------------------------------------------------------------


async def no_acks(self: Flusher, span: Any) -> None:
    self.epoch += 1
    self._tell(span, self.epoch)


async def no_flush(self: Flusher, span: Any) -> None: ...


def importers_first(self: Kvm, span: Any, epoch: int) -> list[Any]:
    waits = self.exports.flush_notify(span, epoch)
    self.vcpus.flush_tlb(span)
    return waits


FLUSHED = [name for name, source in SOURCES.items() if source.told]


@pytest.mark.parametrize("name", FLUSHED)
@pytest.mark.parametrize(
    ("owner", "attribute", "bug", "noticed"),
    [
        (Flusher, "flush", no_flush, "ranges told|the leaf was|small and executable"),
        (Kvm, "_tell_walkers", importers_first, "the CPU could still"),
        (Flusher, "flush", no_acks, "not before|the leaf was"),
    ],
    ids=["no flush", "importers before CPUs", "acks not awaited"],
)
def test_a_planted_bug_is_noticed_at_every_source(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: type, attribute: str, bug: Any, noticed: str
) -> None:
    monkeypatch.setattr(owner, attribute, bug)
    with pytest.raises(AssertionError, match=noticed):
        behaves(SOURCES[name])
