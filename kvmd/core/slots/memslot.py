"""Memslots: which guest frames are backed by which host virtual addresses.

Models KVM_SET_USER_MEMORY_REGION, its second form and the lookup of a gfn [KVM kvm_main.c]: checks in the
kernel's order with the kernel's errnos.  A change is planned first (`plan`) and applied second, because
deleting or moving a slot must zap and flush in between; the limit of the gpa is checked after that
(`check_limit`), as the kernel does.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, IntFlag, auto

from kvmd.core.mm.space import TASK_SIZE
from kvmd.core.slots.dirty_bitmap import DirtyBitmap, bitmap_bytes
from kvmd.core.slots.guest_memfd import Binding, GuestMemfd
from protocol.errors import UapiError
from protocol.flow import RwLock, Wait
from protocol.hva_index import HvaIndex
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva

MAX_SLOTS = 32764
MAX_SLOT_PAGES = (1 << 31) - 1
MAX_ADDRESS_SPACES = 2  # 0 normal, 1 SMM


class SlotFlag(IntFlag):
    LOG_DIRTY_PAGES = 1
    READONLY = 2
    GUEST_MEMFD = 4


class SlotChange(Enum):
    CREATE = auto()
    DELETE = auto()
    MOVE = auto()
    FLAGS_ONLY = auto()
    NONE = auto()


@dataclass(frozen=True, slots=True)
class Memslot:
    """`dirty` is there while the slot logs into a bitmap, `private` if it has a guest_memfd."""

    id: int
    as_id: int
    base_gfn: Gfn
    npages: int
    hva: Hva
    flags: SlotFlag
    dirty: DirtyBitmap | None = field(default=None, compare=False)
    private: Binding | None = field(default=None, compare=False)
    readonly: bool = field(init=False)
    logs: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "readonly", SlotFlag.READONLY in self.flags)
        object.__setattr__(self, "logs", SlotFlag.LOG_DIRTY_PAGES in self.flags)

    @property
    def span(self) -> GfnSpan:
        return GfnSpan.of_pages(self.base_gfn, self.npages)

    @property
    def number(self) -> int:
        """As user space says it: the address space in the high half."""
        return self.as_id << 16 | self.id

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

    def hvas_of(self, span: GfnSpan) -> tuple[Hva, Hva] | None:
        """The host addresses that back what the slot has of `span`."""
        first, end = max(span.start, self.base_gfn), min(span.end, self.base_gfn + self.npages)
        return (self.hva_of(Gfn(first)), self.hva_of(Gfn(end))) if first < end else None


def _no_memfd() -> GuestMemfd:
    raise UapiError(errno.EBADF, "no guest_memfd came with the request")


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """struct kvm_userspace_memory_region2, as the caller sent it; `version` 1 is the shorter struct.

    `guest_memfd()` is fget() of the fd in it, called only when its turn in the checks has come.
    """

    slot: int
    flags: int
    guest_phys_addr: Gpa
    memory_size: int
    userspace_addr: Hva
    version: int = 1
    guest_memfd_offset: int = 0
    guest_memfd: Callable[[], GuestMemfd] = _no_memfd


class Memslots:
    """The slots of one VM, all address spaces.  `gfn_limit` is the first gfn the TDP cannot map.

    `lock` is the slots_lock: whoever changes a slot, or what must be one thing with the slots that are there
    (their logs, their attributes, what is tracked in them), changes it alone.
    """

    def __init__(self, gfn_limit: Gfn, address_spaces: int = MAX_ADDRESS_SPACES) -> None:
        self.address_spaces = address_spaces
        self.gfn_limit = gfn_limit
        self.lock = RwLock()
        self._by_id: dict[int, Memslot] = {}
        self._by_gfn: list[list[Memslot]] = [[] for _ in range(address_spaces)]
        self._bases: list[list[Gfn]] = [[] for _ in range(address_spaces)]  # of `_by_gfn`, to be bisected
        self._by_hva = HvaIndex()
        self.generation = 0
        self.coming: Memslot | None = None  # about to be there: its change has been granted
        self.going: Memslot | None = None  # being deleted or moved
        self.settled: Wait[None] = Wait()  # set when it no longer is
        self.logging = 0  # how many of them log
        self.bitmap_bytes = 0  # of those, with bitmaps or without

    def find(self, gfn: Gfn, as_id: int = 0) -> Memslot | None:
        """The slot that maps `gfn`."""
        at = bisect_right(self._bases[as_id], gfn) - 1
        if at >= 0:
            slot = self._by_gfn[as_id][at]
            if gfn < slot.base_gfn + slot.npages:
                return slot
        return None

    # awaits: slot: it may go; asked again: the loop
    # (tests/unit/kvmd/test_emulated_asleep.py::test_slot_is_going_when_the_page_comes)
    async def settled_slot(self, gfn: Gfn, as_id: int) -> Memslot | None:
        """The slot of `gfn`, once it is not being deleted or moved."""
        while (slot := self.find(gfn, as_id)) is not None and slot is self.going:
            await self.settled
        return slot

    def settle(self) -> None:
        """No slot comes or goes any more: who waited for that looks again."""
        self.going = self.coming = None
        settled, self.settled = self.settled, Wait()
        settled.set(None)

    def numbered(self, number: int) -> Memslot | None:
        """The slot user space calls `number`.  EINVAL: no slot can be called so."""
        as_id, slot_id = number >> 16, number & 0xFFFF
        if as_id >= self.address_spaces or slot_id >= MAX_SLOTS:
            raise UapiError(
                errno.EINVAL,
                f"slot {number:#x}: {self.address_spaces} address spaces, slots up to {MAX_SLOTS - 1}",
            )
        return self._by_id.get(number)

    def __iter__(self) -> Iterator[Memslot]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def plan(self, region: MemoryRegion) -> tuple[SlotChange, Memslot | None, Memslot | None]:
        """What setting `region` means: (change, old slot, new slot).  Raises UapiError, changes nothing."""
        _check_region(region, self.address_spaces)
        old = self.numbered(region.slot)
        if region.memory_size == 0:
            if old is None:
                raise UapiError(errno.EINVAL, f"delete slot {region.slot:#x}: there is no such slot")
            return SlotChange.DELETE, old, None
        new = Memslot(
            region.slot & 0xFFFF,
            region.slot >> 16,
            Gfn(region.guest_phys_addr >> PAGE_SHIFT),
            region.memory_size >> PAGE_SHIFT,
            region.userspace_addr,
            SlotFlag(region.flags),
        )
        change = _kind_of_change(old, new)
        if change in (SlotChange.CREATE, SlotChange.MOVE):
            self._check_overlap(new)
        return change, old, new

    def check_limit(self, new: Memslot) -> None:
        """The architecture's check, the last one: a move that fails it zaps everything all the same."""
        if new.span.end > self.gfn_limit:
            raise UapiError(errno.EINVAL, f"slot {new.id}: {new.span} is beyond gfn {self.gfn_limit:#x}")

    def replace(self, old: Memslot | None, new: Memslot | None) -> None:
        if old is not None:
            del self._by_id[old.number]
            at = bisect_left(self._bases[old.as_id], old.base_gfn)
            del self._bases[old.as_id][at], self._by_gfn[old.as_id][at]
            self._by_hva.remove(old.number, old.hva, old.npages << PAGE_SHIFT)
            self._count(old, -1)
        if new is not None:
            self._by_id[new.number] = new
            at = bisect_left(self._bases[new.as_id], new.base_gfn)
            self._bases[new.as_id].insert(at, new.base_gfn)
            self._by_gfn[new.as_id].insert(at, new)
            self._by_hva.add(new.number, new.hva, new.npages << PAGE_SHIFT)
            self._count(new, 1)
        self.generation += 1

    def _count(self, slot: Memslot, one: int) -> None:
        if slot.logs:
            self.logging += one
            self.bitmap_bytes += one * bitmap_bytes(slot.npages)

    def backed_by(self, start: Hva, end: Hva) -> list[GfnSpan]:
        """What host addresses start..end back, of each slot that has some."""
        near = [self._by_id[number] for number in self._by_hva.near(start, end)]
        return [span for slot in near if (span := slot.gfns_of(start, end)) is not None]

    def _check_overlap(self, new: Memslot) -> None:
        bases = self._bases[new.as_id]
        first, behind = bisect_right(bases, new.base_gfn) - 1, bisect_left(bases, new.span.end)
        for other in self._by_gfn[new.as_id][max(first, 0) : behind]:
            if other.id != new.id and other.span.overlaps(new.span):
                raise UapiError(
                    errno.EEXIST, f"slot {new.id}: {new.span} overlaps slot {other.id}, {other.span}"
                )


def _valid_flags(region: MemoryRegion) -> SlotFlag:
    """Private memory is neither logged nor read-only, and only the second struct can name it."""
    if region.version == 1:
        return SlotFlag.LOG_DIRTY_PAGES | SlotFlag.READONLY
    if region.flags & SlotFlag.GUEST_MEMFD:
        return SlotFlag.GUEST_MEMFD
    return SlotFlag.LOG_DIRTY_PAGES | SlotFlag.READONLY


def _check_region(region: MemoryRegion, address_spaces: int) -> None:
    """The checks that look at the argument alone, in the kernel's order [KVM kvm_main.c]."""
    gpa, size, hva = region.guest_phys_addr, region.memory_size, region.userspace_addr
    as_id, slot_id = region.slot >> 16, region.slot & 0xFFFF
    private = region.flags & SlotFlag.GUEST_MEMFD
    offset = region.guest_memfd_offset
    checks = (
        (region.flags & ~int(_valid_flags(region)), f"flags {region.flags:#x}: bits that cannot be set here"),
        (size % PAGE_SIZE, f"size {size:#x}: not whole pages"),
        (gpa % PAGE_SIZE, f"gpa {gpa:#x}: not whole pages"),
        (hva % PAGE_SIZE or hva + size > TASK_SIZE, f"hva {hva:#x}: unaligned or not user space"),
        (
            private and (offset % PAGE_SIZE or offset + size >= 1 << 64),
            f"guest_memfd_offset {offset:#x}: unaligned or wraps",
        ),
        (
            as_id >= address_spaces or slot_id >= MAX_SLOTS,
            f"slot {slot_id} of address space {as_id}: at most {MAX_SLOTS - 1} of {address_spaces}",
        ),
        (gpa + size >= 1 << 64, f"gpa {gpa:#x} size {size:#x}: wraps"),
        ((size >> PAGE_SHIFT) > MAX_SLOT_PAGES, f"size {size:#x}: more than {MAX_SLOT_PAGES} pages"),
    )
    for failed, why in checks:
        if failed:
            raise UapiError(errno.EINVAL, why)


def _kind_of_change(old: Memslot | None, new: Memslot) -> SlotChange:
    if old is None:
        return SlotChange.CREATE
    if (SlotFlag.GUEST_MEMFD in new.flags) or old.private is not None:
        raise UapiError(errno.EINVAL, f"slot {new.id}: one with a guest_memfd can only be deleted")
    fixed = (old.hva, old.npages, old.readonly)
    if fixed != (new.hva, new.npages, new.readonly):
        raise UapiError(errno.EINVAL, f"slot {new.id}: hva, size and READONLY cannot change; delete it first")
    if old.base_gfn != new.base_gfn:
        return SlotChange.MOVE
    return SlotChange.FLAGS_ONLY if old.flags != new.flags else SlotChange.NONE
