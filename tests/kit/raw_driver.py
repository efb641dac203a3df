"""A remapping unit's driver by hand: registers at their offsets, tables and queues as words of the manual.

Nothing here uses the product's layouts but the three pages it hands the unit; what it stores, and what it
expects to find, are literals of [VT-d 9, 11.4].
"""

from __future__ import annotations

import struct

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.unit_registers import Events, RegisterPages
from protocol.hostmem import Window, WindowKind
from protocol.hw.qi import IQEI
from protocol.hw.register_page import RegisterPage
from protocol.units import Hpa

GCMD, GSTS, RTADDR = 0x18, 0x1C, 0x20
FSTS, FECTL = 0x34, 0x38
IQH, IQT, IQA, ICS, IECTL, IQERCD = 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xB0
PQH, PQT, PQA, PRS, PECTL = 0xC0, 0xC8, 0xD0, 0xDC, 0xE0
QIE, SRTP, TE = 1 << 26, 1 << 30, 1 << 31
PFO, PPF, IQE, ICE, ITE = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 6
PPR, PRO, IWC, IM, IP = 1 << 0, 1 << 1, 1 << 0, 1 << 31, 1 << 30
WIDE = (RTADDR, IQH, IQT, IQA, IQERCD, PQH, PQT, PQA)
FAULTS_AT, FAULTS = 0x400, 64

STRUCTURES, PAGES = 0x4100_0000, 64  # root, ring, then as they are needed
QUEUES = 0x5000_0000
ENTRIES = 128  # of the invalidation queue


class Stopped(Exception):
    """The invalidation queue did; `iqei` says why."""

    def __init__(self, iqei: int) -> None:
        super().__init__(iqei)
        self.iqei = IQEI(iqei)


class RawDriver:
    """Brings the unit up; `pqs` as in PQA.  Units of one memory are told apart by `number`."""

    def __init__(
        self, unit: RemappingUnit, memory: PhysicalMemory, *, pqs: int = 4, up: bool = True, number: int = 0
    ) -> None:
        self.unit = unit
        self.structures_at = STRUCTURES + (number << 24)
        self.queues_at = QUEUES + (number << 24)
        self.ring_at = self.structures_at + 0x1000
        self.shown, self.taken, self.stored = (bytearray(4096) for _ in range(3))
        self.structures = bytearray(PAGES * 4096)
        self.requests_bytes = 4096 << pqs
        self.queues = bytearray(self.requests_bytes + 4096)
        for kind, base, backing in (
            (WindowKind.TABLES, self.structures_at, self.structures),
            (WindowKind.QUEUES, self.queues_at, self.queues),
        ):
            memory.add(Window(kind, Hpa(base), len(backing), memoryview(backing)), lambda: None)
        self.fault_events = self.request_events = self.completions = 0
        self._next = self.structures_at + 0x2000
        self._entries: dict[int, int] = {}  # where PASID entry 0 of a function lies
        self.tail = 0  # an index
        self.pqs = pqs
        self.connect()
        if up:
            self.bring_up()

    def connect(self) -> None:
        pages = RegisterPages(
            *(RegisterPage(memoryview(page)) for page in (self.shown, self.taken, self.stored))
        )
        self.unit.connect(pages, Events(self._on_fault, self._on_request, self._on_completion))

    def come_back(self) -> None:
        """Another driver: everything is as it is made."""
        for page in (self.shown, self.taken, self.stored, self.structures, self.queues):
            page[:] = bytes(len(page))
        self._next = self.structures_at + 0x2000
        self._entries.clear()
        self.tail = 0
        self.connect()
        self.bring_up()

    def bring_up(self) -> None:
        self.store(RTADDR, self.structures_at | 1 << 10)
        self.store(IQA, self.ring_at | 1 << 11)
        self.store(PQA, self.queues_at | self.pqs)
        for command, status in ((QIE, QIE), (QIE | SRTP, QIE | SRTP), (QIE | TE, QIE | SRTP | TE)):
            self.store(GCMD, command)
            self.unit.kick()
            assert self.load(GSTS) == status
        self.completions = 0

    def _on_fault(self) -> None:
        self.fault_events += 1

    def _on_request(self) -> None:
        self.request_events += 1

    def _on_completion(self) -> None:
        self.completions += 1

    # -- registers -------------------------------------------------------------------------------------

    def store(self, offset: int, value: int) -> None:
        size = 8 if offset in WIDE else 4
        self.stored[offset : offset + size] = value.to_bytes(size, "little")

    def load(self, offset: int, size: int = 0) -> int:
        size = size or (8 if offset in WIDE else 4)
        return int.from_bytes(self.shown[offset : offset + size], "little")

    def clear(self, offset: int, bits: int) -> None:
        """Write 1 to bits that show: their toggles are flipped."""
        show = self.load(offset) & bits
        now = int.from_bytes(self.stored[offset : offset + 4], "little") ^ show
        self.stored[offset : offset + 4] = now.to_bytes(4, "little")

    # -- tables ----------------------------------------------------------------------------------------

    def put(self, at: int, *words: int) -> None:
        offset = at - self.structures_at
        self.structures[offset : offset + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    def get(self, at: int) -> int:
        return int.from_bytes(
            self.structures[at - self.structures_at : at - self.structures_at + 8], "little"
        )

    def page(self) -> int:
        self._next += 4096
        return self._next - 4096

    def root_entry(self, rid: int) -> int:
        """Where the half for that function lies."""
        return self.structures_at + 16 * (rid >> 8) + (8 if rid & 0x80 else 0)

    def context_entry(self, rid: int) -> int:
        return (self.get(self.root_entry(rid)) & ~0xFFF) + 32 * (rid & 0x7F)

    def add_function(self, rid: int) -> None:
        """Everything on the way to a PASID entry of zeroes."""
        if not self.get(self.root_entry(rid)) & 1:
            self.put(self.root_entry(rid), self.page() | 1)
        directory, table = self.page(), self.page()
        self.put(directory, table | 1)
        self.put(self.context_entry(rid), directory | 1 << 4 | 1 << 2 | 1, 0, 0, 0)  # PRE, DTE, P
        self._entries[rid] = table

    def directory(self, rid: int) -> int:
        return self.get(self.context_entry(rid)) & ~0xFFF

    def write_pasid_entry(self, rid: int, raw: bytes) -> None:
        """Of requests without PASID; word 0 last."""
        if rid not in self._entries:
            self.add_function(rid)
        words = struct.unpack("<8Q", raw)
        self.put(self._entries[rid] + 8, *words[1:])
        self.put(self._entries[rid], words[0])

    # -- the invalidation queue ------------------------------------------------------------------------

    def queue(self, raw: bytes) -> list[tuple[int, int]]:
        """Into the ring, and the tail behind them; where each wait with SW is to store what."""
        waits = []
        for at in range(0, len(raw) - 31, 32):
            words = list(struct.unpack_from("<4Q", raw, at))
            index = (self.tail + at // 32) % ENTRIES
            if words[0] & 0x2F == 0x25:
                status = self.requests_bytes + 4 * index
                words[1] = self.queues_at + status
                self.queues[status : status + 4] = (~words[0] >> 32 & 0xFFFF_FFFF).to_bytes(4, "little")
                waits.append((status, words[0] >> 32))
            self.put(self.ring_at + 32 * index, *words)
        self.store(IQT, (32 * self.tail + len(raw)) % (32 * ENTRIES))
        self.tail = (self.tail + len(raw) // 32) % ENTRIES
        return waits

    def execute(self, raw: bytes) -> list[int]:
        """The status data of each completed wait.  Raises Stopped, with the queue as it stopped."""
        waits = self.queue(raw)
        self.unit.kick()
        if self.load(FSTS) & IQE:
            raise Stopped(self.load(IQERCD) & 0xF)
        return [data for at, data in waits if self.status(at) == data]

    def recover(self) -> None:
        """The descriptor at which the queue stopped becomes a wait that does nothing."""
        self.put(self.ring_at + self.load(IQH), 5, 0, 0, 0)
        self.clear(FSTS, IQE)
        self.unit.kick()

    def status(self, at: int) -> int:
        return int.from_bytes(self.queues[at : at + 4], "little")

    # -- page requests and faults ----------------------------------------------------------------------

    def take_requests(self) -> list[bytes]:
        """The entries between head and tail; the head moves past them."""
        self.clear(PRS, PPR)
        head = int.from_bytes(self.stored[PQH : PQH + 8], "little")
        tail = self.load(PQT)
        found = []
        while head != tail:
            found.append(bytes(self.queues[head : head + 32]))
            head = (head + 32) % self.requests_bytes
        self.store(PQH, head)
        return found

    def clear_overflow(self) -> None:
        self.clear(PRS, PRO)
        self.unit.kick()

    def take_faults(self) -> list[bytes]:
        """Records with F, from FRI on; all are cleared, and so is PFO."""
        found = []
        first = self.load(FSTS) >> 8 & 0xFF
        for n in range(FAULTS):
            at = FAULTS_AT + 16 * ((first + n) % FAULTS)
            raw = bytes(self.shown[at : at + 16])
            if not raw[15] & 0x80:
                break
            found.append(raw)
            self.stored[at + 15] ^= 0x80
        self.clear(FSTS, PFO)
        self.unit.kick()
        return found
