"""The host machine: its memory, its CPUs' paging features, its processes.

Models what is there once per host, whatever VMs run: physical memory (table pages and frames, laid out as
`protocol/hostmem.py` says), what the CPUs' EPT can do, and the address spaces of the processes on it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvmd.core.mm.fork import fork
from kvmd.core.mm.frames import Frames, Reuse
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.space import MmState
from kvmd.core.tables.compiled import Compiled, Load
from kvmd.core.tables.root_policy import CPUS, RootPolicy
from kvmd.core.tables.tdp_table import Role
from protocol.errors import UapiError
from protocol.flow import Wait, done
from protocol.frame_tags import OWNER_BITS, FrameTags
from protocol.hostmem import Window
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.units import LEVEL_1G, Hpa, Level

MAX_MMS = (1 << OWNER_BITS) - 2  # the last number is nobody's: SHARED_OWNER


class Obstacle(Enum):
    """Why a KVM refuses every export, whatever the VM [RFC 03/42], [RFC 35/42], [RFC 38/42]."""

    COMPILED_OUT = "compiled-out"
    AMD = "amd"
    NO_TDP_MMU = "no-tdp-mmu"
    HYPERV = "hyperv"
    PRESENT_BIT_11 = "present-bit-11"


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """What the host's CPUs can do, and what its KVM was built with; the guest's width may be smaller."""

    cpus: int = 8
    maxphyaddr: int = 46
    ept_levels: int = 4
    max_page_level: Level = LEVEL_1G
    ept_ad_bits: bool = True
    pml: bool = True  # page-modification logging: needs the A/D bits
    address_spaces: int = 2  # 1: built without SMM
    dirty_ring_with_bitmap: bool = True  # NEED_KVM_DIRTY_RING_WITH_BITMAP: devices write without a vCPU

    def root_level(self, guest_maxphyaddr: int) -> Level:
        """5 only with 5-level EPT and a guest wider than 48 bits [RFC 29/42]."""
        return Level(5) if self.ept_levels == 5 and guest_maxphyaddr > 48 else Level(4)

    def role_of(self, guest_maxphyaddr: int, as_id: int, policy: RootPolicy = CPUS) -> Role:
        """Of the root for a guest of that width."""
        return Role(self.root_level(guest_maxphyaddr), as_id, self.ept_ad_bits, policy)


class Clock(Protocol):
    """Time, which a core may not ask for itself."""

    def tick(self) -> Wait[None]:
        """Set once everybody else who could run has had a turn."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970."""


class HostKernel:
    def __init__(
        self,
        features: CpuFeatures,
        tables: Window,
        frames: Window,
        tags: FrameTags | None,
        discard: Callable[[int, int], None],
        clock: Clock,
        *,
        obstacles: frozenset[Obstacle] = frozenset(),
        memlock_pages: int | None = None,
        reuse: Reuse = Reuse.SOON,
        seq_start: int = 0,
        zap_batch: int | None = None,
        load_compiled: Load | None = None,
        cond_resched: Callable[[], Wait[None]] = lambda: done(None),
    ) -> None:
        self.features = features
        self.clock = clock
        self.seq_start = seq_start  # of each VM's invalidations: tests start near a wrap (R2)
        self.zap_batch = zap_batch  # leaves that a zap clears before others get a turn
        self.obstacles = obstacles  # what keeps this host's KVM from exporting
        self.cond_resched = cond_resched  # awaited by long work: everybody else gets a turn
        self.ept_rules = ept_rules(features.maxphyaddr, features.max_page_level)
        self.writer = TableWriter(tables.base, tables.view)
        self.compiled = Compiled(self.writer, load_compiled)
        self.pool = TablePool(self.writer, tables.size)
        self.frames = Frames(frames.base, frames.view, discard, tags, reuse)
        self.memory = PageAllocator(self.frames, lambda: self.cond_resched(), memlock_pages)
        self._frames_base = frames.base
        self._frames_view = frames.view
        self._mms: dict[int, Mm] = {}
        self._next_vm = 1

    def create_mm(self) -> Mm:
        """A new process's address space.  EAGAIN: too many."""
        mm_id = next((i for i in range(1, MAX_MMS + 1) if i not in self._mms), None)
        if mm_id is None:
            raise UapiError(errno.EAGAIN, f"there are {MAX_MMS} processes already")
        mm = Mm(mm_id, self.memory)
        self._mms[mm_id] = mm
        return mm

    # awaits: child: cannot change: nobody else has it before this returns
    async def fork_mm(self, mm: Mm) -> Mm:
        """The address space of a child of `mm`'s process.  EAGAIN; errors as of `fork`, and then there is
        none."""
        child = self.create_mm()
        try:
            await fork(mm, child)
        except UapiError:
            self.forget_mm(child)
            raise
        return child

    @property
    def processes(self) -> list[Mm]:
        return list(self._mms.values())

    # awaits: mm: cannot change: its fd is closed, and whoever else has it does not bring it back
    async def exit_mm(self, mm: Mm) -> None:
        """The process ends; who has to do with its memory besides may be a while."""
        await mm.exit()
        self.put_mm(mm)

    async def release_mirror(self, mirror: Mirror) -> None:
        """Its channel is closed."""
        # await: mirror: cannot change: nobody asks anything of it any more
        await mirror.release()
        self.put_mm(mirror.mm)

    async def change_process(self, mirror: Mirror, payer: Mm | None) -> None:
        """Another process pays, or the one that paid before.  Errors as of `Mirror.change_process`."""
        before = mirror.mm
        asked = mirror.undo_change_process() if payer is None else mirror.change_process(payer)
        # await: before: cannot change: one that somebody else changes meanwhile is put twice, which is
        # nothing
        await asked
        self.put_mm(before)

    def put_mm(self, mm: Mm) -> None:
        """Somebody has nothing to do with `mm` any more: the last one forgets it [mmdrop]."""
        if mm.state is MmState.EXITED and not mm.notifiers:
            self.forget_mm(mm)

    def forget_mm(self, mm: Mm) -> None:
        if self._mms.get(mm.id) is mm:  # its exit and its last VM's end may both find nothing left of it
            del self._mms[mm.id]

    def new_vm_id(self) -> int:
        vm_id = self._next_vm
        self._next_vm += 1
        return vm_id

    def read_frame(self, hpa: Hpa, size: int) -> bytes:
        """Bytes of a frame, as a CPU reads them."""
        at = hpa - self._frames_base
        return bytes(self._frames_view[at : at + size])

    def write_frame(self, hpa: Hpa, data: bytes) -> None:
        at = hpa - self._frames_base
        self._frames_view[at : at + len(data)] = data
