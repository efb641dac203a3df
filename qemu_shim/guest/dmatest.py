"""The kernel's DMA test: its parameters, patterns, checks and lines, for a channel that copies or sets.

Models a thread of drivers/dma/dmatest.c [dmatest].  The CPU fills source and destination before each test and
checks every byte of both after it, by a counter in the low five bits; the time taken is the transfers'
alone.  One thread is `dmatest`; how many run on which channels is the caller's.

Not modelled: `xor` and `pq` threads, which a DSA has no operation for; `polled`, which the kernel turns off
for channels that complete out of order; `nobounce`, there being no bounce buffer.  Departure: the kernel's
DSA driver hides the status of a transfer, so that dmatest finds wrong data; here the status is told.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol

from protocol.errors import UapiError
from protocol.hw.dsa import CompletionRecord, Status
from protocol.units import PAGE_SIZE
from qemu_shim.guest.memory import GuestMemory

PATTERN_SRC = 0x80
PATTERN_DST = 0x00
PATTERN_COPY = 0x40
PATTERN_OVERWRITE = 0x20
PATTERN_COUNT_MASK = 0x1F
PATTERN_MEMSET_IDX = 0x01
MAX_ERROR_COUNT = 32
MEMSET_BYTES = 8  # the set value, repeated to a fill's pattern
_NS_PER_US = 1000

Limit = Callable[[Awaitable[CompletionRecord], int], Awaitable[CompletionRecord | None]]


class DmaChannel(Protocol):
    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord: ...
    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DmatestParams:
    """Module parameters, named as the kernel's; `iterations` has no "endless"."""

    iterations: int
    test_buf_size: int = 16384
    threads_per_chan: int = 1
    dmatest: int = 0  # 0 copies, 1 sets
    timeout: int = 3000  # ms; -1: none
    noverify: bool = False
    norandom: bool = False
    verbose: bool = False
    alignment: int = -1  # log2; -1: the device's, which has none
    transfer_size: int = 0

    @property
    def kind(self) -> str:
        return "set" if self.dmatest else "copy"

    def problem(self) -> str | None:
        if self.transfer_size >= self.test_buf_size:
            return f"transfer_size {self.transfer_size} is not less than test_buf_size {self.test_buf_size}"
        if self.alignment >= 0 and 1 << self.alignment > self.test_buf_size:
            return f"{self.test_buf_size}-byte buffer too small for {1 << self.alignment}-byte alignment"
        return None


@dataclass(slots=True)
class Result:
    """What a thread did; `lines` are what it printed, `code` is what it returned."""

    thread: str
    tests: int = 0
    failures: int = 0
    bytes_verified: int = 0
    total_len: int = 0
    runtime_us: int = 0
    code: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        iops = _per_second(self.runtime_us, self.tests)
        kbs = _per_second(self.runtime_us, self.total_len >> 10) >> 8
        fraction = (iops & 0xFF) * 100 >> 8
        return (
            f"dmatest: {self.thread}: summary {self.tests} tests, {self.failures} failures "
            f"{iops >> 8}.{fraction:02d} iops {kbs} KB/s ({self.code})"
        )


class Transfer(NamedTuple):
    """One test: where in the buffers, and how much."""

    src_off: int
    dst_off: int
    size: int


class Region(NamedTuple):
    """Bytes start..end of a buffer, and what they must be: `base` and a counter that begins at `counter`."""

    start: int
    end: int
    counter: int
    base: int


def counted(base: int, counter: int, size: int, *, memset: bool = False) -> bytes:
    """`base` with the inverse of a counter in its low bits; a memset's counter stands still."""
    if memset:
        return bytes([base | ~PATTERN_MEMSET_IDX & PATTERN_COUNT_MASK]) * size
    cycle = PATTERN_COUNT_MASK + 1
    first = counter % cycle
    wheel = bytes(base | ~n & PATTERN_COUNT_MASK for n in range(cycle))
    return (wheel * (size // cycle + 2))[first : first + size]


def source_pattern(size: int) -> bytes:
    """All of it to be copied."""
    return counted(PATTERN_SRC | PATTERN_COPY, 0, size)


async def no_limit(done: Awaitable[CompletionRecord], timeout_ms: int) -> CompletionRecord | None:
    return await done


class Thread:
    """`limit` waits for a completion for so many milliseconds; None: it did not come."""

    def __init__(
        self,
        name: str,
        channel: DmaChannel,
        memory: GuestMemory,
        clock_ns: Callable[[], int],
        params: DmatestParams,
        chance: Random,
        limit: Limit = no_limit,
    ) -> None:
        self.result = Result(name)
        self._channel = channel
        self._memory = memory
        self._clock_ns = clock_ns
        self._params = params
        self._chance = chance
        self._limit = limit
        self._memset = params.dmatest == 1

    async def run(self) -> Result:
        """All iterations; the buffers are page-aligned and the thread's for all of them."""
        result, params = self.result, self._params
        problem = params.problem()
        if problem is not None:
            result.lines.append(f"dmatest: {result.thread}: {problem}")
            result.code = -errno.EINVAL
            return result
        pages = (params.test_buf_size + PAGE_SIZE - 1) // PAGE_SIZE
        src, dst = self._memory.allocate(pages), self._memory.allocate(pages)
        for _ in range(params.iterations):
            result.tests += 1
            transfer = self._choose()
            result.total_len += transfer.size
            text, count = await self._test(src, dst, transfer)
            passed = text == "test passed"
            result.failures += not passed
            if not passed or params.verbose:
                result.lines.append(
                    f"dmatest: {result.thread}: result #{result.tests}: '{text}' with "
                    f"src_off={transfer.src_off:#x} dst_off={transfer.dst_off:#x} len={transfer.size:#x} "
                    f"({count})"
                )
        return result

    def _choose(self) -> Transfer:
        params = self._params
        align = max(params.alignment, 0)
        size = params.test_buf_size
        if params.transfer_size:
            size = params.transfer_size
        elif not params.norandom:
            size = self._chance.getrandbits(32) % params.test_buf_size + 1
        if not params.transfer_size:
            size = size >> align << align or 1 << align
        if params.norandom:
            return Transfer(0, 0, size)
        room = params.test_buf_size - size + 1
        src_off, dst_off = (self._chance.getrandbits(32) % room >> align << align for _ in range(2))
        return Transfer(src_off, dst_off, size)

    async def _test(self, src: int, dst: int, transfer: Transfer) -> tuple[str, int]:
        """The text of the result line, and the number behind it."""
        params = self._params
        if not params.noverify:
            await self._memory.write(src, self._contents(self._source_regions(transfer)))
            await self._memory.write(dst, self._contents(self._destination_regions(transfer, done=False)))
        began = self._clock_ns()
        try:
            record = await self._limit(self._submit(src, dst, transfer), params.timeout)
        except UapiError as error:
            return "submit error", -error.errno
        self.result.runtime_us += max((self._clock_ns() - began) // _NS_PER_US, 1)
        if record is None:
            return "test timed out", 0
        if record.status is not Status.SUCCESS:
            self.result.lines.append(
                f"dmatest: {self.result.thread}: {record.status.name} at {record.fault_addr:#x}"
            )
            return "completion error status", 0
        if params.noverify:
            return "test passed", 0
        wrong = await self._verify(src, self._source_regions(transfer), "srcbuf")
        wrong += await self._verify(dst, self._destination_regions(transfer, done=True), "dstbuf")
        return ("data error", wrong) if wrong else ("test passed", 0)

    def _submit(self, src: int, dst: int, transfer: Transfer) -> Awaitable[CompletionRecord]:
        to = dst + transfer.dst_off
        if self._memset:
            value = counted(PATTERN_SRC | PATTERN_COPY, 0, MEMSET_BYTES, memset=True)
            return self._channel.fill(to, int.from_bytes(value, "little"), transfer.size)
        return self._channel.memmove(to, src + transfer.src_off, transfer.size)

    # -- what the buffers hold -------------------------------------------------------------------------

    def _source_regions(self, transfer: Transfer) -> Iterator[Region]:
        start, size = transfer.src_off, transfer.size
        return self._regions(start, size, PATTERN_SRC, PATTERN_SRC | PATTERN_COPY, start)

    def _destination_regions(self, transfer: Transfer, *, done: bool) -> Iterator[Region]:
        """Bytes copied carry the source's counter."""
        start, size = transfer.dst_off, transfer.size
        inside = PATTERN_SRC | PATTERN_COPY if done else PATTERN_DST | PATTERN_OVERWRITE
        return self._regions(start, size, PATTERN_DST, inside, transfer.src_off if done else start)

    def _regions(self, start: int, size: int, outside: int, inside: int, counter: int) -> Iterator[Region]:
        end = start + size
        yield Region(0, start, 0, outside)
        yield Region(start, end, counter, inside)
        yield Region(end, self._params.test_buf_size, end, outside)

    def _contents(self, regions: Iterator[Region]) -> bytes:
        return b"".join(
            counted(region.base, region.counter, region.end - region.start, memset=self._memset)
            for region in regions
        )

    async def _verify(self, gpa: int, regions: Iterator[Region], what: str) -> int:
        """Count wrong bytes; each region prints the first few of its own."""
        buffer = await self._memory.read(gpa, self._params.test_buf_size)
        self.result.bytes_verified += len(buffer)
        return sum(self._verify_region(buffer, region, what) for region in regions)

    def _verify_region(self, buffer: bytes, region: Region, what: str) -> int:
        actual = buffer[region.start : region.end]
        expected = counted(region.base, region.counter, len(actual), memset=self._memset)
        if actual == expected:
            return 0
        wrong = [n for n, (a, e) in enumerate(zip(actual, expected, strict=True)) if a != e]
        for n in wrong[:MAX_ERROR_COUNT]:
            verdict = _verdict(what, actual[n], region.base)
            self.result.lines.append(
                f"dmatest: {self.result.thread}: {what}[{region.start + n:#x}] {verdict} "
                f"Expected {expected[n]:02x}, got {actual[n]:02x}"
            )
        if len(wrong) > MAX_ERROR_COUNT:
            self.result.lines.append(
                f"dmatest: {self.result.thread}: {len(wrong) - MAX_ERROR_COUNT} errors suppressed"
            )
        return len(wrong)


def _verdict(what: str, actual: int, base: int) -> str:
    """What a wrong byte's high bits say about how it got there."""
    differs = actual ^ base
    if what == "srcbuf":
        return "overwritten!"
    if base & PATTERN_COPY and differs & (PATTERN_COPY | PATTERN_OVERWRITE):
        return "not copied!"
    if differs & PATTERN_SRC:
        return "was copied!"
    return "mismatch!"


def _per_second(runtime_us: int, count: int) -> int:
    """Fixed point with 8 fraction bits, as dmatest reckons."""
    return (count * 1_000_000 << 8) // runtime_us if runtime_us > 0 else 0
