"""Memslots: which guest frames are backed by which host virtual addresses.

Models KVM_SET_USER_MEMORY_REGION and the lookup of a gfn [KVM kvm_main.c]: checks in the kernel's order
with the kernel's errnos.  A change is planned first (`plan`) and applied second, because deleting or
moving a slot must zap and flush in between.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntFlag, auto

from protocol.errors import UapiError
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva

MAX_SLOTS = 32764
MAX_SLOT_PAGES = (1 << 31) - 1
ADDRESS_SPACES = 2  # 0 normal, 1 SMM
USER_SPACE_END = 1 << 47


class SlotFlag(IntFlag):
    LOG_DIRTY_PAGES = 1
    READONLY = 2


VALID_FLAGS = int(SlotFlag.LOG_DIRTY_PAGES | SlotFlag.READONLY)


class Change(Enum):
    CREATE = auto()
    DELETE = auto()
    MOVE = auto()
    FLAGS_ONLY = auto()
    NONE = auto()


@dataclass(frozen=True, slots=True)
class Memslot:
    id: int
    as_id: int
    base_gfn: Gfn
    npages: int
    hva: Hva
    flags: SlotFlag
    readonly: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "readonly", SlotFlag.READONLY in self.flags)

    @property
    def span(self) -> GfnSpan:
        return GfnSpan.of_pages(self.base_gfn, self.npages)

    def hva_of(self, gfn: Gfn) -> Hva:
        return Hva(self.hva + ((gfn - self.base_gfn) << PAGE_SHIFT))

    def gfns_of(self, start: Hva, end: Hva) -> GfnSpan | None:
        """The gfns of the slot that host addresses start..end back."""
        first = max(start, self.hva)
        last = min(end, self.hva + (self.npages << PAGE_SHIFT))
        if first >= last:
            return None
        base = self.base_gfn
        return GfnSpan(
            Gfn(base + ((first - self.hva) >> PAGE_SHIFT)),
            Gfn(base + ((last - self.hva + PAGE_SIZE - 1) >> PAGE_SHIFT)),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """struct kvm_userspace_memory_region, as the caller sent it."""

    slot: int
    flags: int
    guest_phys_addr: Gpa
    memory_size: int
    userspace_addr: Hva


class Memslots:
    """The slots of one VM, all address spaces.  `gfn_limit` is the first gfn the TDP cannot map."""

    def __init__(self, gfn_limit: Gfn) -> None:
        self._gfn_limit = gfn_limit
        self._by_id: dict[tuple[int, int], Memslot] = {}
        self._by_gfn: list[list[Memslot]] = [[] for _ in range(ADDRESS_SPACES)]
        self.generation = 0

    def find(self, gfn: Gfn, as_id: int = 0) -> Memslot | None:
        """The slot that maps `gfn`."""
        slots = self._by_gfn[as_id]
        at = bisect_right(slots, gfn, key=lambda s: s.base_gfn) - 1
        if at >= 0 and gfn < slots[at].base_gfn + slots[at].npages:
            return slots[at]
        return None

    def __iter__(self) -> Iterator[Memslot]:
        return iter(list(self._by_id.values()))

    def plan(self, region: Region) -> tuple[Change, Memslot | None, Memslot | None]:
        """What setting `region` means: (change, old slot, new slot).  Raises UapiError, changes nothing."""
        _check_region(region)
        as_id, slot_id = region.slot >> 16, region.slot & 0xFFFF
        old = self._by_id.get((as_id, slot_id))
        if region.memory_size == 0:
            if old is None:
                raise UapiError(errno.EINVAL, f"delete slot {slot_id}: there is no such slot")
            return Change.DELETE, old, None
        new = Memslot(
            slot_id,
            as_id,
            Gfn(region.guest_phys_addr >> PAGE_SHIFT),
            region.memory_size >> PAGE_SHIFT,
            region.userspace_addr,
            SlotFlag(region.flags),
        )
        change = _kind_of_change(old, new)
        if change in (Change.CREATE, Change.MOVE):
            self._check_overlap(new)
        if change is not Change.NONE and new.span.end > self._gfn_limit:
            raise UapiError(errno.EINVAL, f"slot {slot_id}: {new.span} is beyond gfn {self._gfn_limit:#x}")
        return change, old, new

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        if old is not None:
            del self._by_id[old.as_id, old.id]
            self._by_gfn[old.as_id].remove(old)
        if new is not None:
            self._by_id[new.as_id, new.id] = new
            slots = self._by_gfn[new.as_id]
            slots.insert(bisect_right(slots, new.base_gfn, key=lambda s: s.base_gfn), new)
        self.generation += 1

    def _check_overlap(self, new: Memslot) -> None:
        for other in self._by_gfn[new.as_id]:
            if other.id != new.id and other.span.overlaps(new.span):
                raise UapiError(
                    errno.EEXIST, f"slot {new.id}: {new.span} overlaps slot {other.id}, {other.span}"
                )


def _check_region(region: Region) -> None:
    """The checks that look at the argument alone, in the kernel's order [KVM kvm_main.c]."""
    gpa, size, hva = region.guest_phys_addr, region.memory_size, region.userspace_addr
    checks = (
        (region.flags & ~VALID_FLAGS, f"flags {region.flags:#x}: unknown bits"),
        ((region.slot & 0xFFFF) >= MAX_SLOTS, f"slot {region.slot & 0xFFFF}: at most {MAX_SLOTS - 1}"),
        (gpa % PAGE_SIZE or size % PAGE_SIZE, f"gpa {gpa:#x} size {size:#x}: not whole pages"),
        (hva % PAGE_SIZE or hva + size > USER_SPACE_END, f"hva {hva:#x}: unaligned or not user space"),
        (
            (region.slot >> 16) >= ADDRESS_SPACES,
            f"address space {region.slot >> 16}: there are {ADDRESS_SPACES}",
        ),
        (gpa + size >= 1 << 64, f"gpa {gpa:#x} size {size:#x}: wraps"),
        ((size >> PAGE_SHIFT) > MAX_SLOT_PAGES, f"size {size:#x}: more than {MAX_SLOT_PAGES} pages"),
    )
    for failed, why in checks:
        if failed:
            raise UapiError(errno.EINVAL, why)


def _kind_of_change(old: Memslot | None, new: Memslot) -> Change:
    if old is None:
        return Change.CREATE
    fixed = (old.hva, old.npages, old.readonly)
    if fixed != (new.hva, new.npages, new.readonly):
        raise UapiError(errno.EINVAL, f"slot {new.id}: hva, size and READONLY cannot change; delete it first")
    if old.base_gfn != new.base_gfn:
        return Change.MOVE
    return Change.FLAGS_ONLY if old.flags != new.flags else Change.NONE
