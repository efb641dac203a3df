"""A remapping unit before one function, its memory in plain bytes, and a driver that answers when told to.

Tables are written entry by entry as the manuals' rows say, hardware records as literal words: nothing here
uses the encoders under test.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from device_sim.core.dmar import RemappingUnit
from device_sim.core.function import Function
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from protocol.hostmem import Window, WindowKind
from protocol.hw.caps import Cap, Ecap
from protocol.units import MIB, Hpa, IovaPfn
from tests.kit.by_hand import ByHand
from tests.kit.raw_driver import FAULTS, FAULTS_AT, RawDriver

RID = 0x6A08
DID = 5
TABLES = 0x10_0000
FRAMES = 0x1_0000_0000
PFN = FRAMES >> 12
R, W, X, LEAF = 1, 2, 4, 0x80
RWX = R | W | X
FRAMES_SIZE = 4 * MIB


# -- literal records -----------------------------------------------------------------------------------


def descriptor(qw0: int, qw1: int = 0) -> bytes:
    return struct.pack("<4Q", qw0, qw1, 0, 0)


def iotlb_pages(did: int, page: int, am: int = 0, *, ih: bool = False) -> bytes:
    return descriptor(2 | 3 << 4 | did << 16, am | ih << 6 | page << 12)


def iotlb_domain(did: int) -> bytes:
    return descriptor(2 | 2 << 4 | did << 16)


def iotlb_global() -> bytes:
    return descriptor(2 | 1 << 4)


def devtlb_page(rid: int, page: int) -> bytes:
    return descriptor(3 | rid << 32, page << 12)


def devtlb_all(rid: int) -> bytes:
    return descriptor(3 | rid << 32, 0x7FFF_FFFF_FFFF_F000 | 1)


def pasid_cache(did: int) -> bytes:
    return descriptor(7 | 1 << 4 | did << 16)


def wait(data: int) -> bytes:
    return descriptor(5 | 1 << 5 | 1 << 6 | data << 32)


def response(rid: int, prgi: int, code: int) -> bytes:
    return descriptor(9 | code << 12 | rid << 16, prgi << 3 | 1 << 2)


def pasid_entry(root: int, levels: int = 4, did: int = DID, *, pgtt: int = 2, aw: int | None = None) -> bytes:
    width = levels - 2 if aw is None else aw
    return struct.pack("<8Q", root | pgtt << 6 | width << 2 | 1, 3 << 23 | did, 0, 0, 0, 0, 0, 0)


class Asked(NamedTuple):
    """A page request as the driver reads it from the ring."""

    rid: int
    prgi: int
    page: int
    read: bool
    write: bool
    last: bool


def page_request(raw: bytes) -> Asked:
    qw0, qw1, qw2, qw3 = struct.unpack("<4Q", raw)
    assert qw0 & 0xFF == 1
    assert (qw0 >> 8 & 0xFF, qw0 >> 32, qw2, qw3) == (0, 0, 0, 0), "no PASID, no private data"
    read, write, last = (qw1 >> n & 1 == 1 for n in (0, 1, 2))
    return Asked(qw0 >> 16 & 0xFFFF, qw1 >> 3 & 0x1FF, qw1 >> 12, read, write, last)


class Recorded(NamedTuple):
    """A fault record as the driver reads it: reason, page, requester, and whether F is set."""

    reason: int
    page: int
    rid: int
    f: bool


def fault_record(raw: bytes) -> Recorded:
    qw0, qw1 = struct.unpack("<2Q", raw)
    return Recorded(qw1 >> 32 & 0xFF, qw0 >> 12, qw1 & 0xFFFF, qw1 >> 63 == 1)


# -- memory --------------------------------------------------------------------------------------------


class Tables:
    """Table pages from `base` up; the first one is the root."""

    def __init__(self, pages: int = 32, levels: int = 4, base: int = TABLES) -> None:
        self.base = self.root = base
        self.levels = levels
        self.memory = bytearray(pages * 4096)
        self._next = base + 4096

    def load(self, at: int) -> int:
        return int.from_bytes(self.memory[at - self.base : at - self.base + 8], "little")

    def store(self, at: int, entry: int) -> None:
        self.memory[at - self.base : at - self.base + 8] = entry.to_bytes(8, "little")

    def entry_at(self, page: int, level: int = 1) -> int:
        """Where the entry of `level` for `page` lies; tables on the way are made."""
        table = self.root
        for above in range(self.levels, level, -1):
            at = table + 8 * (page >> 9 * (above - 1) & 511)
            if not self.load(at) & 3:
                self.store(at, self._next | RWX)
                self._next += 4096
            table = self.load(at) & 0xF_FFFF_FFFF_F000
        return table + 8 * (page >> 9 * (level - 1) & 511)

    def map(self, page: int, pfn: int, level: int = 1, rights: int = RWX) -> None:
        self.store(self.entry_at(page, level), pfn << 12 | rights | (LEAF if level > 1 else 0))

    def unmap(self, page: int, level: int = 1) -> None:
        self.store(self.entry_at(page, level), 0)


def window(kind: WindowKind, base: int, memory: bytearray) -> Window:
    return Window(kind, Hpa(base), len(memory), memoryview(memory))


class Silicon(ByHand):
    """The unit, memory, and one function; flows run when `start` or `respond` is called."""

    def __init__(
        self,
        *,
        levels: int = 4,
        max_page: str = "1G",
        haw: int = 46,
        tags: bool = False,
        cap: Cap | None = None,
        ecap: Ecap | None = None,
        descriptors_at_once: int | None = None,
    ) -> None:
        super().__init__()
        self.tables = Tables(levels=levels)
        self.frames = bytearray(FRAMES_SIZE)
        self.tags = bytearray(FRAMES_SIZE // 4096 * 8)
        self.memory = PhysicalMemory()
        self.memory.add(window(WindowKind.TABLES, TABLES, self.tables.memory), lambda: None)
        self.memory.add(window(WindowKind.FRAMES, FRAMES, self.frames), lambda: None)
        if tags:
            self.memory.add(window(WindowKind.FRAME_TAGS, FRAMES, self.tags), lambda: None)
        usual_cap, usual_ecap = capabilities(levels=levels, max_page=max_page)
        self.now = 0
        cap = Cap((cap or usual_cap).value | FAULTS_AT // 16 << 24 | FAULTS - 1 << 40)
        self.unit = RemappingUnit(
            cap, ecap or usual_ecap, haw, self.memory, descriptors_at_once=descriptors_at_once
        )
        self.driver = RawDriver(self.unit, self.memory)
        self.driver.add_function(RID)
        self.function = Function(RID, self.unit, self.memory, lambda: self.now)

    @property
    def events(self) -> int:
        """Of faults and page requests."""
        return self.driver.fault_events + self.driver.request_events

    def attach(self, allocation: int = 2048) -> None:
        """What the driver does, in one go."""
        self.write_pasid_entry(RID, pasid_entry(self.tables.root, self.tables.levels))
        self.function.ats_enabled = self.function.dma_enabled = True
        if allocation:
            self.function.pri.enable(allocation)

    def write_pasid_entry(self, rid: int, raw: bytes) -> None:
        self.driver.write_pasid_entry(rid, raw)

    def execute(self, raw: bytes) -> list[int]:
        """Descriptors; the status data of each completed wait."""
        return self.driver.execute(raw)

    def map(self, page: int, frame: int, *, level: int = 1, rights: int = RWX) -> None:
        """Frame number `frame` of the window behind `page`."""
        self.tables.map(page, PFN + frame, level, rights)

    def bytes_of(self, frame: int, size: int = 4096, offset: int = 0) -> bytes:
        at = frame * 4096 + offset
        return bytes(self.frames[at : at + size])

    def fill_frame(self, frame: int, data: bytes, offset: int = 0) -> None:
        at = frame * 4096 + offset
        self.frames[at : at + len(data)] = data

    def set_tag(self, frame: int, tag: int) -> None:
        self.tags[8 * frame : 8 * frame + 8] = tag.to_bytes(8, "little")

    def translate(self, page: int, need: int = R) -> tuple[int, int, int]:
        """(hpa of the leaf, level, rights) of an ATS translation request."""
        entry = self.unit.translation_request(RID, IovaPfn(page), need)
        return entry.hpa, entry.level, entry.rights

    def faults(self) -> list[Recorded]:
        return [fault_record(raw) for raw in self.driver.take_faults()]

    # -- the driver ------------------------------------------------------------------------------------

    def requests(self) -> list[Asked]:
        """The entries written since the last call; the head moves past them."""
        return [page_request(raw) for raw in self.driver.take_requests()]

    def respond(self, prgi: int, code: int = 0) -> None:
        self.execute(response(RID, prgi, code))
        self.flows.run_ready()

    def serve(self, code: int = 0) -> list[Asked]:
        """Answer every group that is waiting; what was asked."""
        asked = self.requests()
        for request in asked:
            if request.last:
                self.respond(request.prgi, code)
        return asked
