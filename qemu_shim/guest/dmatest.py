"""The kernel's DMA test, one memcpy thread: patterns, verification, and its summary line.

Models drivers/dma/dmatest.c with the parameters of the RFC's author: norandom, verify on, interrupts
instead of polling [dmatest].  The CPU fills source and destination before each test and checks every
byte of both after it; the time taken is the transfers' alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from protocol.hw.dsa import CompletionRecord, Status
from protocol.units import PAGE_SIZE
from qemu_shim.guest.memory import GuestMemory

PATTERN_SRC = 0x80
PATTERN_COPY = 0x40
PATTERN_OVERWRITE = 0x20
PATTERN_COUNT_MASK = 0x1F
MAX_ERRORS_SHOWN = 32
_NS_PER_US = 1000


class Channel(Protocol):
    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord: ...


@dataclass(slots=True)
class Result:
    """What a thread did; `lines` are what it printed."""

    thread: str
    tests: int = 0
    failures: int = 0
    bytes_verified: int = 0
    bytes_moved: int = 0
    runtime_us: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        iops = _per_second(self.runtime_us, self.tests)
        kbs = _per_second(self.runtime_us, self.bytes_moved >> 10) >> 8
        fraction = (iops & 0xFF) * 100 >> 8
        return (
            f"dmatest: {self.thread}: summary {self.tests} tests, {self.failures} failures "
            f"{iops >> 8}.{fraction:02d} iops {kbs} KB/s (0)"
        )


def source_pattern(size: int) -> bytes:
    return bytes(PATTERN_SRC | PATTERN_COPY | ~i & PATTERN_COUNT_MASK for i in range(size))


def destination_pattern(size: int) -> bytes:
    return bytes(PATTERN_OVERWRITE | ~i & PATTERN_COUNT_MASK for i in range(size))


async def dmatest(
    channel: Channel,
    memory: GuestMemory,
    clock_ns: Callable[[], int],
    *,
    iterations: int,
    buf_size: int,
    thread: str = "dma0chan0-copy0",
) -> Result:
    """Run it: buffers are page-aligned and the thread's for all iterations."""
    result = Result(thread)
    pages = (buf_size + PAGE_SIZE - 1) // PAGE_SIZE
    src, dst = memory.allocate(pages), memory.allocate(pages)
    expected = source_pattern(buf_size)
    before = destination_pattern(buf_size)
    for number in range(1, iterations + 1):
        await memory.write(src, expected)
        await memory.write(dst, before)
        began = clock_ns()
        record = await channel.memmove(dst, src, buf_size)
        result.runtime_us += max((clock_ns() - began) // _NS_PER_US, 1)
        result.tests += 1
        if record.status is not Status.SUCCESS:
            text, count = f"completion error status {record.status.name}", 1
        else:
            result.bytes_moved += buf_size
            mismatches = _compare(result, await memory.read(src, buf_size), expected, "src")
            mismatches += _compare(result, await memory.read(dst, buf_size), expected, "dst")
            text, count = ("data error", mismatches) if mismatches else ("test passed", 0)
        result.failures += count != 0
        result.lines.append(
            f"dmatest: {thread}: result #{number}: '{text}' with src_off=0x0 dst_off=0x0 "
            f"len={buf_size:#x} ({count})"
        )
    return result


def _compare(result: Result, actual: bytes, expected: bytes, what: str) -> int:
    """Count wrong bytes, show the first few."""
    result.bytes_verified += len(expected)
    if actual == expected:
        return 0
    wrong = [i for i, (a, e) in enumerate(zip(actual, expected, strict=True)) if a != e]
    for i in wrong[:MAX_ERRORS_SHOWN]:
        result.lines.append(
            f"dmatest: {what} buffer at {i:#x}: expected {expected[i]:#04x}, got {actual[i]:#04x}"
        )
    return len(wrong)


def _per_second(runtime_us: int, count: int) -> int:
    """Fixed point with 8 fraction bits, as dmatest reckons."""
    return (count * 1_000_000 << 8) // max(runtime_us, 1)
