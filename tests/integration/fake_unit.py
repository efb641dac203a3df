"""A remapping unit that is the test itself, over the memory it shares with the driver: raw offsets and words.

It obeys what it is commanded, stores what waits ask for, and keeps what page group responses say; page
requests are the test's, put into the ring as the driver makes room.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable

from protocol.flow import Wait
from protocol.kernel.port import BrokenEvent, SharedEvent
from protocol.rpc.loop import Loop

PAGE = 4096
CAP, ECAP, GCMD, GSTS, FSTS, ICS = 0x8, 0x10, 0x18, 0x1C, 0x34, 0x9C
IQH, IQT, IQA, IQERCD = 0x80, 0x88, 0x90, 0xB0
PQH, PQT, PQA, PRS = 0xC0, 0xC8, 0xD0, 0xDC
PPR, PRO = 1, 2
ENTRY = 32
RECORDS = 2048 * ENTRY


class FakeUnit:
    """`windows` gives the bytes at an hpa of what the driver handed over, `on_response(rid, prgi, code)` is
    told of each page group response.
    """

    def __init__(
        self,
        loop: Loop,
        windows: Callable[[int], memoryview],
        on_response: Callable[[int, int, int], None],
        store_page: int,
    ) -> None:
        self.loop = loop
        self.consumed = 0  # page requests the driver's head went past
        self.overflows_cleared = 0
        self.obeys = True
        self.descriptors: list[bytes] = []
        self._head = 0  # its own: what the register shows may be anything a test put there
        self._windows = windows
        self._on_response = on_response
        self._stored = mmap.mmap(store_page, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        self._fd, mapping = loop.kernel.memfd("fake registers", 2 * PAGE, peer_writes=False)
        self.registers = mapping.view
        self.kick, self.fault, self.page_request, self.completion = (loop.kernel.event() for _ in range(4))
        self._batches: deque[tuple[deque[bytes], bool]] = deque()
        self._pumping = False
        self._closed = False
        loop.register(self.kick.fd, self._kicked)

    def give_fds(self) -> list[int]:
        events = (self.kick, self.fault, self.page_request, self.completion)
        return [os.dup(fd) for fd in (self._fd, *(event.fd for event in events))]

    # -- registers -------------------------------------------------------------------------------------

    def stored(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self._stored[offset : offset + size], "little")

    def shows(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.registers[offset : offset + size], "little")

    def show(self, offset: int, value: int, size: int = 4) -> None:
        self.registers[offset : offset + size] = value.to_bytes(size, "little")

    def take_clears(self, offset: int) -> int:
        flipped = self.stored(offset) ^ self.shows(PAGE + offset)
        self.show(offset, self.shows(offset) & ~flipped)
        self.show(PAGE + offset, self.stored(offset))
        return flipped

    def _kicked(self, _: int) -> None:
        self.kick.drain()
        for offset in (FSTS, ICS):
            self.take_clears(offset)
        self._take_prs()
        if self.stored(GCMD) & ~self.shows(GSTS):
            self.show(GSTS, self.stored(GCMD))
            self.completion.signal()
        if self.obeys:
            self.execute()

    # -- the invalidation queue ------------------------------------------------------------------------

    def execute(self) -> None:
        ring = self._windows(self.stored(IQA, 8) & ~0xFFF)
        told = False
        while self._head != self.stored(IQT, 8):
            raw = bytes(ring[self._head : self._head + 32])
            self.descriptors.append(raw)
            word = int.from_bytes(raw[:8], "little")
            if word & 0xF == 9:
                self._on_response(word >> 16 & 0xFFFF, raw[8] >> 3 | (raw[9] & 0xF) << 5, word >> 12 & 0xF)
            elif word & 0x2F == 0x25:
                self._windows(int.from_bytes(raw[8:16], "little"))[:4] = raw[4:8]
                told = told or bool(word & 0x10)
            self._head = (self._head + 32) % PAGE
        self.show(IQH, self._head, 8)
        if told:
            self.show(ICS, 1)
            self.completion.signal()

    @property
    def queued(self) -> int:
        """Descriptors not fetched yet."""
        return (self.stored(IQT, 8) - self._head) % PAGE // 32

    # -- page requests ---------------------------------------------------------------------------------

    def send(self, *entries: bytes, overflow: bool = False) -> None:
        """Page requests, as many as there are, and behind them perhaps an overflow."""
        self._batches.append((deque(entries), overflow))
        self._pump()
        if self._batches and not self._pumping:
            self._pumping = True
            self.loop.flows.spawn(self._pump_on())

    async def _pump_on(self) -> None:
        while self._batches and not self._closed:
            turn: Wait[None] = self.loop.tick()
            await turn
            self._pump()
        self._pumping = False

    def _pump(self) -> None:
        """As much as the ring has room for, and an event if that was anything."""
        self._take_prs()
        before = self.shows(PQT, 8)
        while self._batches and not self.shows(PRS) & PRO and not self._closed:
            entries, overflow = self._batches[0]
            while entries and self._put(entries[0]):
                entries.popleft()
            if entries:
                break
            self._batches.popleft()
            if overflow:
                self.show(PRS, self.shows(PRS) | PRO)
        if self.shows(PQT, 8) != before or self.shows(PRS) & PRO:
            self.show(PRS, self.shows(PRS) | PPR)
            self._signal(self.page_request)

    def _put(self, entry: bytes) -> bool:
        tail = self.shows(PQT, 8)
        behind = (tail + ENTRY) % RECORDS
        if behind == self.stored(PQH, 8):
            return False
        self._windows((self.stored(PQA, 8) & ~0xFFF) + tail)[:ENTRY] = entry
        self.show(PQT, behind, 8)
        self.consumed += 1
        return True

    def _take_prs(self) -> None:
        self.overflows_cleared += bool(self.take_clears(PRS) & PRO)

    async def cleared(self) -> int:
        return self.overflows_cleared

    def _signal(self, event: SharedEvent) -> None:
        try:
            event.signal()
        except BrokenEvent:
            assert self._closed

    @property
    def left(self) -> int:
        """Page requests that the driver's head has not gone past."""
        return (self.shows(PQT, 8) - self.stored(PQH, 8)) % RECORDS // ENTRY

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.loop.unregister(self.kick.fd)
            for event in (self.kick, self.fault, self.page_request, self.completion):
                event.close()
            os.close(self._fd)
