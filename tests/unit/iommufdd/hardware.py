"""A remapping unit in miniature, over the same memory: it does what a test says, and nothing else.

Built on raw offsets and words of the manual's tables, not on the driver's code.
"""

from __future__ import annotations

import struct

from iommufdd.core.counts import UnitCounts
from iommufdd.core.intel_iommu import QUEUE_BYTES, IntelIommu, UnitMemory
from iommufdd.core.translation_tables import TranslationTables
from iommufdd.core.unit_registers import UnitRegisters
from protocol.flow import Wait, done
from protocol.hw.caps import Cap, Ecap
from protocol.hw.register_page import RegisterPage
from protocol.pt.mem import TableWriter
from protocol.units import PAGE_SIZE, Hpa
from tests.kit.by_hand import ByHand

TABLES_AT = 0x2000_0000_0000
QUEUES_AT = 0x2100_0000_0000
PAGES = 64
RING_AT = TABLES_AT
GSTS, RTADDR, FSTS, ICS, PRS = 0x1C, 0x20, 0x34, 0x9C, 0xDC
GCMD, IQH, IQT, IQA, IQERCD = 0x18, 0x80, 0x88, 0x90, 0xB0
PQH, PQT, PQA = 0xC0, 0xC8, 0xD0
FAULTS_AT, FAULTS = 0x400, 4
RECORDS = 1 << 16  # bytes of the page request ring
# FRO 0x400, four fault recording registers, ESRTPS
CAP = Cap(FAULTS_AT // 16 << 24 | FAULTS - 1 << 40 | 1 << 63)


def words(raw: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 8}Q", raw)


class MiniatureUnit(ByHand):
    """The memory of one, and the driver over it."""

    def __init__(self, cap: Cap = CAP) -> None:
        super().__init__()
        self.shown, self.taken, self.stored = (bytearray(PAGE_SIZE) for _ in range(3))
        self.memory = bytearray(PAGES * PAGE_SIZE)
        self.queues = bytearray(QUEUE_BYTES)
        self.kicks = self.fences = 0
        self.ended: list[int] = []  # functions whose bus mastering was taken from them
        self.bus: Wait[None] = done(None)  # set or failed: what taking it comes to
        self.counts = UnitCounts()
        self.page_requests: list[tuple[bytes, bool]] = []
        self.faults: list[bytes] = []
        writer = TableWriter(Hpa(TABLES_AT), memoryview(self.memory))
        pages = iter(range(TABLES_AT + PAGE_SIZE, TABLES_AT + PAGES * PAGE_SIZE, PAGE_SIZE))
        tables = TranslationTables(writer, lambda: Hpa(next(pages)))
        registers = UnitRegisters(
            RegisterPage(memoryview(self.shown)),
            RegisterPage(memoryview(self.taken)),
            RegisterPage(memoryview(self.stored)),
            self._fence,
            self._kick,
        )
        queues = memoryview(self.queues).toreadonly()
        ring = memoryview(self.memory)[:PAGE_SIZE]
        self.driver = IntelIommu(
            0,
            cap,
            Ecap(0),
            registers,
            UnitMemory(tables, Hpa(RING_AT), ring, Hpa(QUEUES_AT), queues),
            self.counts,
            lambda _, entries, overflow: self.page_requests.append((entries, overflow)),
            self.faults.extend,
            self._end_dma,
        )

    async def _end_dma(self, rid: int) -> None:
        await self.bus
        self.ended.append(rid)

    def _fence(self) -> None:
        self.fences += 1

    def _kick(self) -> None:
        self.kicks += 1

    def completion(self) -> None:
        """The event, and whoever it wakes."""
        self.driver.on_completion()
        self.flows.run_ready()

    def fault_event(self) -> None:
        self.driver.on_fault()
        self.flows.run_ready()

    # -- registers -------------------------------------------------------------------------------------

    def load(self, offset: int, size: int = 4) -> int:
        """What the driver stored."""
        return int.from_bytes(self.stored[offset : offset + size], "little")

    def show(self, offset: int, value: int, size: int = 4) -> None:
        self.shown[offset : offset + size] = value.to_bytes(size, "little")

    def shows(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.shown[offset : offset + size], "little")

    def take_clears(self, offset: int, size: int = 4) -> int:
        """The bits the driver cleared: they go, then it is told that they went."""
        stored = self.load(offset, size)
        flipped = stored ^ int.from_bytes(self.taken[offset : offset + size], "little")
        self.show(offset, self.shows(offset, size) & ~flipped, size)
        self.taken[offset : offset + size] = stored.to_bytes(size, "little")
        return flipped

    # -- the invalidation queue ------------------------------------------------------------------------

    @property
    def tail(self) -> int:
        """The index behind the last descriptor."""
        return self.load(IQT, 8) // 32

    @property
    def head(self) -> int:
        return self.shows(IQH, 8) // 32

    def descriptor(self, index: int) -> tuple[int, ...]:
        return words(self.memory[index * 32 : index * 32 + 32])

    def execute(self, count: int | None = None, *, waits: bool = True) -> list[tuple[int, ...]]:
        """Fetch so many descriptors, or all of them; waits store their status, unless they are stuck."""
        done: list[tuple[int, ...]] = []
        while self.head != self.tail and (count is None or len(done) < count):
            found = self.descriptor(self.head)
            if found[0] & 0xF == 5 and found[0] & 0x20 and waits:
                self.store_status(found)
            done.append(found)
            self.show(IQH, (self.head + 1) % 128 * 32, 8)
        return done

    def store_status(self, wait: tuple[int, ...]) -> None:
        at = wait[1] - QUEUES_AT
        self.queues[at : at + 4] = (wait[0] >> 32).to_bytes(4, "little")

    # -- tables ----------------------------------------------------------------------------------------

    def context_words(self, rid: int) -> tuple[int, ...]:
        """Of a function's context entry [VT-d 9.1]."""

        def at(hpa: int, size: int) -> tuple[int, ...]:
            return words(self.memory[hpa - TABLES_AT : hpa - TABLES_AT + size])

        root = (self.driver.tables.rtaddr & ~0xFFF) + 16 * (rid >> 8) + 8 * (rid >> 7 & 1)
        return at((at(root, 8)[0] & ~0xFFF) + 32 * (rid & 0x7F), 32)

    # -- page requests ---------------------------------------------------------------------------------

    def request(self, *entries: bytes) -> None:
        """Into the ring, and its tail behind them."""
        tail = self.shows(PQT, 8)
        for entry in entries:
            self.queues[tail : tail + 32] = entry
            tail = (tail + 32) % RECORDS
        self.show(PQT, tail, 8)
        self.show(PRS, self.shows(PRS) | 1)

    # -- faults ----------------------------------------------------------------------------------------

    def record(self, index: int, low: int, high: int) -> None:
        self.show(FAULTS_AT + 16 * index, low, 8)
        self.show(FAULTS_AT + 16 * index + 8, high | 1 << 63, 8)
