"""Tracepoints: events named, and printed, as those of the kernel we model, and where they go.

Models the kernel's tracepoints of KVM, its MMU, the IOMMU core and the VT-d driver, in their printed form
[KVM mmutrace.h], [KVM trace.h], so that what one knows to read, and the scripts one has, serve here too.  A
pointer is printed as the host-physical address of what it points to.
As with the kernel's static keys a tracepoint that is off costs one test: `if TRACE.on: TRACE.emit(...)`.
There is one TRACE a process; `--trace FILE` of a daemon turns it on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar


@dataclass(eq=False, repr=False)
class Event:
    """`str(event)` is what the kernel prints after the event's name.

    Made only to be printed: neither compared nor kept, so its class has nothing that would cost every start.
    """

    NAME: ClassVar[str]
    FORM: ClassVar[str]  # of the fields, which are named as in the kernel

    def __str__(self) -> str:
        return self.FORM.format(self)


class Trace:
    """Where events go.  `on` is all that a tracepoint looks at while nobody listens."""

    __slots__ = ("_sink", "on")

    def __init__(self) -> None:
        self.on = False
        self._sink: Callable[[str], None] = lambda _: None

    def start(self, sink: Callable[[str], None]) -> None:
        """From now on `sink` gets a line an event, without its newline."""
        self._sink, self.on = sink, True

    def stop(self) -> None:
        self.on = False

    def emit(self, event: Event) -> None:
        self._sink(f"{event.NAME}: {event}")


TRACE = Trace()


# -- kvm, kvmmmu ---------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class KvmPageFault(Event):
    """On VMX `error_code` is the exit qualification."""

    NAME = "kvm_page_fault"
    FORM = (
        "vcpu {0.vcpu_id} rip 0x{0.guest_rip:x} address 0x{0.fault_address:016x}"
        " error_code 0x{0.error_code:x}"
    )
    vcpu_id: int
    guest_rip: int
    fault_address: int
    error_code: int


@dataclass(eq=False, repr=False)
class KvmMmuSetSpte(Event):
    NAME = "kvm_mmu_set_spte"
    FORM = "gfn {0.gfn:x} spte {0.spte:x} ({0.rights}) level {0.level} at {0.sptep:x}"
    gfn: int
    spte: int
    level: int
    sptep: int

    @property
    def rights(self) -> str:
        return "".join(letter if self.spte >> n & 1 else "-" for n, letter in enumerate("rwx"))


@dataclass(eq=False, repr=False)
class KvmMmuSpteRequested(Event):
    NAME = "kvm_mmu_spte_requested"
    FORM = "gfn {0.gfn:x} pfn {0.pfn:x} level {0.level}"
    gfn: int
    pfn: int
    level: int


@dataclass(eq=False, repr=False)
class KvmTdpMmuSpteChanged(Event):
    NAME = "kvm_tdp_mmu_spte_changed"
    FORM = "as id {0.as_id} gfn {0.gfn:x} level {0.level} old_spte {0.old_spte:x} new_spte {0.new_spte:x}"
    as_id: int
    gfn: int
    level: int
    old_spte: int
    new_spte: int


@dataclass(eq=False, repr=False)
class KvmMmuSplitHugePage(Event):
    NAME = "kvm_mmu_split_huge_page"
    FORM = "gfn {0.gfn:x} spte {0.spte:x} level {0.level} errno {0.errno}"
    gfn: int
    spte: int
    level: int
    errno: int


@dataclass(eq=False, repr=False)
class MarkMmioSpte(Event):
    NAME = "mark_mmio_spte"
    FORM = "sptep:{0.sptep:x} gfn {0.gfn:x} access {0.access:x} gen {0.gen:x}"
    sptep: int
    gfn: int
    access: int
    gen: int


@dataclass(eq=False, repr=False)
class HandleMmioPageFault(Event):
    NAME = "handle_mmio_page_fault"
    FORM = "addr:{0.addr:x} gfn {0.gfn:x} access {0.access:x}"
    addr: int
    gfn: int
    access: int


@dataclass(eq=False, repr=False)
class KvmUnmapHvaRange(Event):
    NAME = "kvm_unmap_hva_range"
    start: int
    end: int

    def __str__(self) -> str:
        return f"mmu notifier unmap range: {_sharp16(self.start)} -- {_sharp16(self.end)}"


def _sharp16(value: int) -> str:
    """C's %#016lx: the prefix counts, and zero has none."""
    return f"{value:#016x}" if value else "0" * 16


@dataclass(eq=False, repr=False)
class KvmDirtyRingPush(Event):
    NAME = "kvm_dirty_ring_push"
    FORM = (
        "ring {0.index}: dirty 0x{0.dirty_index:x} reset 0x{0.reset_index:x}"
        " slot {0.slot} offset 0x{0.offset:x} (used {0.used})"
    )
    index: int
    dirty_index: int
    reset_index: int
    slot: int
    offset: int
    used: int


@dataclass(eq=False, repr=False)
class KvmDirtyRingExit(Event):
    NAME = "kvm_dirty_ring_exit"
    FORM = "vcpu {0.vcpu_id}"
    vcpu_id: int


# -- iommu ---------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class AttachDeviceToDomain(Event):
    NAME = "attach_device_to_domain"
    FORM = "IOMMU: device={0.device}"
    device: str


# -- intel_iommu ---------------------------------------------------------------------------------------

IOMMU = "dmar0"  # the one remapping unit there is
_FOUR_WORDS = struct.Struct("<4Q")

_QI_NAMES = (
    *("cc_inv", "iotlb_inv", "dev_tlb_inv", "iec_inv", "inv_wait"),
    *("p_iotlb_inv", "pc_inv", "p_dev_tlb_inv", "page_grp_resp"),
)  # by type, from 1


@dataclass(eq=False, repr=False)
class QiSubmit(Event):
    """A descriptor given to the invalidation queue; the wait that the driver appends is not traced."""

    NAME = "qi_submit"
    words: tuple[int, ...]
    iommu: str = IOMMU

    @classmethod
    def of(cls, descriptor: bytes) -> QiSubmit:
        return cls(_FOUR_WORDS.unpack(descriptor))

    def __str__(self) -> str:
        kind = self.words[0] & 0xF
        name = _QI_NAMES[kind - 1] if 1 <= kind <= len(_QI_NAMES) else f"0x{kind:x}"
        return " ".join([f"{name} {self.iommu}:", *(f"0x{word:x}" for word in self.words)])


@dataclass(eq=False, repr=False)
class PrqReport(Event):
    """An entry of a unit's page request queue; `seq` counts them."""

    NAME = "prq_report"
    words: tuple[int, ...]
    seq: int
    iommu: str = IOMMU

    @classmethod
    def of_queue(cls, entries: bytes, numbers: Iterator[int]) -> Iterator[PrqReport]:
        """`numbers`: the unit's own count."""
        for words in _FOUR_WORDS.iter_unpack(entries):
            yield cls(words, next(numbers))

    def __str__(self) -> str:
        w0, w1, w2, w3 = self.words
        rid = w0 >> 16 & 0xFFFF
        marks = ((w1, 0, "r"), (w1, 1, "w"), (w0, 52, "x"), (w0, 53, "p"), (w1, 2, "l"))
        flags = "".join(letter if word >> n & 1 else "-" for word, n, letter in marks)
        fields = f"pasid=0x{w0 >> 32 & 0xFFFFF:x} index=0x{w1 >> 3 & 0x1FF:x}"
        private = f" private=0x{w2:x}/0x{w3:x}" if w0 >> 9 & 1 else ""
        where = f"{self.iommu}/{pci_name(rid)} seq# {self.seq}: rid=0x{rid:x} addr=0x{w1 >> 12:x}"
        return f"{where} {flags} {fields}{private}"


def pci_name(rid: int) -> str:
    return f"0000:{rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7}"
