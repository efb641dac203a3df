"""KVM_SET_USER_MEMORY_REGION: which check comes first, and what a change is [KVM kvm_main.c]."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.slots.memslot import MAX_SLOT_PAGES, MAX_SLOTS, MemoryRegion, Memslots, SlotChange
from protocol.errors import UapiError
from protocol.units import Gfn, GfnSpan, Gpa, Hva

HVA = 0x1000_0000_0000
LIMIT = Gfn(1 << 34)


def region(
    slot: int = 0, flags: int = 0, gpa: int = 0x10_0000, size: int = 0x1_0000, hva: int = HVA
) -> MemoryRegion:
    return MemoryRegion(slot, flags, Gpa(gpa), size, Hva(hva))


def slots(*regions: MemoryRegion) -> Memslots:
    made = Memslots(LIMIT)
    for wanted in regions:
        _, old, new = made.plan(wanted)
        made.replace(old, new)
    return made


def checked(made: Memslots, wanted: MemoryRegion) -> None:
    _, _, new = made.plan(wanted)
    assert new is not None
    made.check_limit(new)


def refused(made: Memslots, wanted: MemoryRegion) -> tuple[int, str]:
    before, generation = list(made), made.generation
    with pytest.raises(UapiError) as caught:
        checked(made, wanted)
    assert (list(made), made.generation) == (before, generation), "a refused change changes nothing"
    return caught.value.errno, caught.value.why


# In the kernel's order: with this and everything below wrong as well, this is what is said.
ORDER = [
    ("flags", region(0xFFFF_FFFF, 4, 0x123, 0x456, 0x789), errno.EINVAL, "flags"),
    ("size", region(0xFFFF_FFFF, 3, 0x123, 0x456, 0x789), errno.EINVAL, "size"),
    ("gpa", region(0xFFFF_FFFF, 3, 0x123, 0x1000, 0x789), errno.EINVAL, "gpa"),
    ("hva", region(0xFFFF_FFFF, 3, 0x1000, 0xFFFF_FFFF_FFFF_F000, 0x789), errno.EINVAL, "hva"),
    ("as_id", region(0x2_0000, 3, 0xFFFF_FFFF_FFFF_F000, 1 << 44, 0), errno.EINVAL, "address space"),
    ("slot", region(0x1_7FFC, 3, 0xFFFF_FFFF_FFFF_F000, 1 << 44, 0), errno.EINVAL, "slot"),
    ("wraps", region(0x1_0000, 3, 0xFFFF_FFFF_FFFF_F000, 1 << 44, 0), errno.EINVAL, "wraps"),
    ("too many", region(0x1_0000, 3, 0, 1 << 44, 0), errno.EINVAL, "more than"),
]


@pytest.mark.parametrize(
    ("wanted", "number", "word"), [row[1:] for row in ORDER], ids=[row[0] for row in ORDER]
)
def test_the_first_failing_check_speaks(wanted: MemoryRegion, number: int, word: str) -> None:
    got, why = refused(slots(), wanted)
    assert got == number
    assert word in why


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (region(slot=MAX_SLOTS), errno.EINVAL),
        (region(gpa=0x10_0800), errno.EINVAL),
        (region(size=0x1800), errno.EINVAL),
        (region(hva=HVA + 1), errno.EINVAL),
        (region(hva=(1 << 47) - 0x1_0000), errno.EINVAL),  # the last page of user space is nobody's
        (region(size=(MAX_SLOT_PAGES + 1) << 12, hva=0), errno.EINVAL),
        (region(gpa=(1 << 46) - 0x8000), errno.EINVAL),  # beyond what the TDP maps
        (region(slot=5, size=0), errno.EINVAL),  # no such slot
        (region(slot=1, gpa=0x10_8000), errno.EEXIST),
        (region(slot=1, gpa=0x10_8000, size=0x1000), errno.EEXIST),
        (region(slot=1, gpa=0, size=1 << 24), errno.EEXIST),
        (region(slot=0, size=0x2_0000), errno.EINVAL),
        (region(slot=0, hva=HVA + 0x1000), errno.EINVAL),
        (region(slot=0, flags=2), errno.EINVAL),
        (region(slot=2, gpa=0x10_F000), errno.EEXIST),  # a move onto another slot
    ],
)
def test_what_the_kernel_refuses_is_refused(wanted: MemoryRegion, number: int) -> None:
    made = slots(region(), region(slot=2, gpa=0x100_0000))
    assert refused(made, wanted)[0] == number


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        (region(slot=1, gpa=0x11_0000), SlotChange.CREATE),
        (region(slot=1, gpa=0xF_0000), SlotChange.CREATE),
        (region(slot=MAX_SLOTS - 1, gpa=0), SlotChange.CREATE),
        (region(slot=0x1_0000), SlotChange.CREATE),  # the same place in the other address space
        (region(slot=1, gpa=(1 << 46) - 0x1_0000), SlotChange.CREATE),
        (region(slot=1, gpa=0x11_0000, hva=(1 << 47) - 0x1_1000), SlotChange.CREATE),
        (region(), SlotChange.NONE),
        (region(flags=1), SlotChange.FLAGS_ONLY),
        (region(gpa=0x10_8000), SlotChange.MOVE),  # onto a part of itself
        (region(gpa=0x1000_0000, flags=1), SlotChange.MOVE),
        (region(size=0), SlotChange.DELETE),
        (region(size=0, gpa=0xFFFF_F000, hva=0), SlotChange.DELETE),
    ],
)
def test_a_change_is_what_the_kernel_calls_it(wanted: MemoryRegion, change: SlotChange) -> None:
    made = slots(region())
    planned, old, new = made.plan(wanted)
    assert planned is change
    assert (old is None) == (change is SlotChange.CREATE)
    assert (new is None) == (change is SlotChange.DELETE)


def test_a_gfn_is_in_the_slot_that_covers_it() -> None:
    made = slots(region(0, gpa=0x1000, size=0x2000), region(1, gpa=0x4000, size=0x1000), region(0x1_0000))
    found = [made.find(Gfn(gfn)) for gfn in range(6)]
    assert [slot.id if slot else None for slot in found] == [None, 0, 0, None, 1, None]
    assert made.find(Gfn(0x100)) is None
    other = made.find(Gfn(0x100), 1)
    assert other is not None
    assert other.as_id == 1


def test_a_gfn_and_its_hva_belong_together() -> None:
    slot = slots(region()).find(Gfn(0x10F))
    assert slot is not None
    assert slot.hva_of(Gfn(0x10F)) == HVA + 0xF000


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        (HVA, HVA + 0x1_0000, (0x100, 0x110)),
        (0, 1 << 47, (0x100, 0x110)),
        (HVA + 0x3000, HVA + 0x4000, (0x103, 0x104)),
        (HVA + 0x3001, HVA + 0x3002, (0x103, 0x104)),
        (HVA + 0x3FFF, HVA + 0x4001, (0x103, 0x105)),
        (HVA - 0x1000, HVA, None),
        (HVA + 0x1_0000, HVA + 0x2_0000, None),
    ],
)
def test_host_addresses_are_rounded_outwards_to_gfns(
    start: int, end: int, span: tuple[int, int] | None
) -> None:
    """A range cut short would miss a flush (defect B-29)."""
    slot = slots(region()).find(Gfn(0x100))
    assert slot is not None
    expected = None if span is None else GfnSpan(Gfn(span[0]), Gfn(span[1]))
    assert slot.gfns_of(Hva(start), Hva(end)) == expected


def test_every_change_has_a_generation() -> None:
    made = slots(region())
    assert made.generation == 1
    _, old, new = made.plan(region(size=0))
    made.replace(old, new)
    assert made.generation == 2
    assert list(made) == []
