"""Which slots lie over host addresses, and over each other's gfns: as who looks at all of them says."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvmd.core.slots.memslot import MemoryRegion, Memslot, Memslots, SlotFlag
from protocol.errors import UapiError
from protocol.hva_index import HvaIndex
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva

SEEDS = range(20)
NUMBERS = 12
PAGES = 96  # of addresses, so that areas meet
HVA = 0x1000_0000_0000


def hva(page: int) -> Hva:
    return Hva(HVA + (page << PAGE_SHIFT))


def changed(slots: Memslots, random: Random) -> None:
    """One slot comes, goes, moves or begins to log; what overlaps another is refused."""
    number, npages = random.randrange(NUMBERS), random.choice((1, 1, 2, 3, 8, 33))
    gfn, page = random.randrange(PAGES), random.randrange(PAGES)
    old = slots.numbered(number)
    if old is not None and random.random() < 0.5:
        npages, page = old.npages, (old.hva - HVA) >> PAGE_SHIFT
    wanted = Memslot(number, 0, Gfn(gfn), npages, hva(page), SlotFlag(random.randrange(2)))
    size = npages << PAGE_SHIFT if old is None or random.random() < 0.6 else 0
    region = MemoryRegion(number, wanted.flags, Gpa(gfn << PAGE_SHIFT), size, wanted.hva)
    overlaps = any(slot.id != number and slot.span.overlaps(wanted.span) for slot in slots)
    stays = old is not None and old.base_gfn == wanted.base_gfn
    is_another = old is not None and (old.npages, old.hva) != (npages, wanted.hva)
    if size and (is_another or (overlaps and not stays)):
        with pytest.raises(UapiError):
            slots.plan(region)
    else:
        slots.replace(*slots.plan(region)[1:])


@pytest.mark.parametrize("seed", SEEDS)
def test_they_are_those_that_lie_there(seed: int) -> None:
    random, slots = Random(seed), Memslots(Gfn(1 << 34))
    for _ in range(200):
        changed(slots, random)
        start, end = sorted(random.sample(range(PAGES + 40), 2))
        spans = [slot.gfns_of(hva(start), hva(end)) for slot in sorted(slots, key=lambda slot: slot.number)]
        assert slots.backed_by(hva(start), hva(end)) == [span for span in spans if span is not None]
        by_gfn = sorted(slots, key=lambda slot: slot.base_gfn)
        assert all(a.span.end <= b.span.start for a, b in pairwise(by_gfn))
        assert [slots.find(slot.base_gfn) for slot in by_gfn] == by_gfn
        logging = [slot for slot in slots if slot.logs]
        assert slots.logging == len(logging)
        assert slots.bitmap_bytes == sum((slot.npages + 63) // 64 * 8 for slot in logging)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_overlaps_is_refused_and_nothing_else(seed: int) -> None:
    random, slots = Random(seed), Memslots(Gfn(1 << 34))
    refused = 0
    for number in range(60):
        span = GfnSpan.of_pages(Gfn(random.randrange(400)), random.choice((1, 2, 5, 40)))
        region = MemoryRegion(
            number, 0, Gpa(span.start << PAGE_SHIFT), span.npages << PAGE_SHIFT, hva(number * 64)
        )
        overlaps = any(slot.span.overlaps(span) for slot in slots)
        refused += overlaps
        if overlaps:
            with pytest.raises(UapiError, match=f"slot {number}: .* overlaps slot"):
                slots.plan(region)
        else:
            slots.replace(*slots.plan(region)[1:])
    assert 0 < refused < 60


def test_of_thousands_it_looks_at_those_that_may_lie_there() -> None:
    index = HvaIndex()
    for name in range(10_000):
        index.add(name, hva(2 * name), PAGE_SIZE)
    index.add(10_000, hva(0), 20_000 * PAGE_SIZE)
    assert index.near(hva(5_000), hva(5_001)) == [2_500, 10_000]
    index.remove(10_000, hva(0), 20_000 * PAGE_SIZE)
    index.remove(2_500, hva(5_000), PAGE_SIZE)
    assert index.near(hva(5_000), hva(5_001)) == []
