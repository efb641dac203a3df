"""dmatest: its patterns byte for byte, what it notices, and the lines it prints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol.hw.dsa import Status
from qemu_shim.guest.dmatest import Result, destination_pattern, dmatest, source_pattern
from tests.unit.qemu_shim.guests import PAGE, CopyChannel, Ram


def ticks(step_ns: int) -> Iterator[int]:
    now = 0
    while True:
        yield now
        now += step_ns


async def run(
    channel: CopyChannel, *, iterations: int = 1, buf_size: int = PAGE, step_ns: int = 100_000
) -> Result:
    clock = ticks(step_ns)
    return await dmatest(
        channel, channel.ram.memory(), lambda: next(clock), iterations=iterations, buf_size=buf_size
    )


def test_the_source_pattern_counts_down_from_df_to_c0_and_again() -> None:
    assert source_pattern(34).hex() == (
        "dfdedddcdbdad9d8d7d6d5d4d3d2d1d0cfcecdcccbcac9c8c7c6c5c4c3c2c1c0dfde"
    )


def test_the_destination_pattern_counts_down_from_3f_to_20_and_again() -> None:
    assert destination_pattern(34).hex() == (
        "3f3e3d3c3b3a393837363534333231302f2e2d2c2b2a292827262524232221203f3e"
    )


@pytest.mark.parametrize("buf_size", [1, 64, PAGE, 2 * PAGE + 5])
async def test_a_channel_that_copies_passes_and_every_byte_was_looked_at(buf_size: int) -> None:
    channel = CopyChannel(Ram())
    result = await run(channel, iterations=3, buf_size=buf_size)
    assert (result.tests, result.failures) == (3, 0)
    assert result.bytes_verified == 3 * 2 * buf_size
    assert result.bytes_moved == 3 * buf_size
    dst, src, _ = channel.moves[0]
    assert channel.moves == [(dst, src, buf_size)] * 3
    assert src % PAGE == dst % PAGE == 0
    assert abs(src - dst) >= buf_size
    assert channel.ram.bytes[dst : dst + buf_size] == source_pattern(buf_size)


async def test_a_channel_that_does_nothing_fails_on_every_byte() -> None:
    channel = CopyChannel(Ram())

    def undo(number: int) -> None:
        dst, _, size = channel.moves[-1]
        channel.ram.bytes[dst : dst + size] = destination_pattern(size)

    channel.spoil = undo
    result = await run(channel, iterations=2, buf_size=64)
    assert (result.tests, result.failures) == (2, 2)
    assert result.lines[-1].endswith("'data error' with src_off=0x0 dst_off=0x0 len=0x40 (64)")


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("at", [0, 100, PAGE - 1])
async def test_one_wrong_byte_on_either_side_is_found_and_counted(side: str, at: int) -> None:
    channel = CopyChannel(Ram())

    def flip(number: int) -> None:
        dst, src, _ = channel.moves[-1]
        if number == 2:
            channel.ram.bytes[(src if side == "src" else dst) + at] ^= 0x01

    channel.spoil = flip
    result = await run(channel, iterations=3)
    good = source_pattern(PAGE)[at]
    assert result.failures == 1
    assert result.lines == [
        "dmatest: dma0chan0-copy0: result #1: 'test passed' with src_off=0x0 dst_off=0x0 len=0x1000 (0)",
        f"dmatest: {side} buffer at {at:#x}: expected {good:#04x}, got {good ^ 1:#04x}",
        "dmatest: dma0chan0-copy0: result #2: 'data error' with src_off=0x0 dst_off=0x0 len=0x1000 (1)",
        "dmatest: dma0chan0-copy0: result #3: 'test passed' with src_off=0x0 dst_off=0x0 len=0x1000 (0)",
    ]


async def test_at_most_32_wrong_bytes_are_shown_and_all_are_counted() -> None:
    channel = CopyChannel(Ram())

    def wipe(number: int) -> None:
        dst, _, _ = channel.moves[-1]
        channel.ram.bytes[dst : dst + 40] = bytes(40)

    channel.spoil = wipe
    result = await run(channel)
    assert len(result.lines) == 32 + 1
    assert result.lines[-1].endswith("(40)")


async def test_a_completion_error_is_a_failure_and_moves_no_bytes() -> None:
    channel = CopyChannel(Ram())
    channel.status = lambda number: Status.PAGE_FAULT_IR if number == 1 else Status.SUCCESS
    result = await run(channel, iterations=2)
    assert (result.tests, result.failures, result.bytes_moved) == (2, 1, PAGE)
    assert "'completion error status PAGE_FAULT_IR'" in result.lines[0]
    assert result.lines[0].endswith("(1)")
    assert "'test passed'" in result.lines[1]


async def test_buffers_are_filled_anew_for_every_test() -> None:
    """The planted bug: a device that copies the first time only."""
    channel = CopyChannel(Ram())

    def forget(number: int) -> None:
        dst, _, size = channel.moves[-1]
        if number > 1:
            channel.ram.bytes[dst : dst + size] = destination_pattern(size)

    channel.spoil = forget
    assert (await run(channel, iterations=3)).failures == 2


async def test_only_the_transfer_is_timed() -> None:
    result = await run(CopyChannel(Ram()), iterations=4, step_ns=250_000)
    assert result.runtime_us == 4 * 250


async def test_a_transfer_takes_at_least_a_microsecond() -> None:
    assert (await run(CopyChannel(Ram()), iterations=3, step_ns=0)).runtime_us == 3


@pytest.mark.parametrize(
    ("tests", "failures", "moved", "runtime_us", "text"),
    [
        (5, 0, 5 * 4096, 1000, "5 tests, 0 failures 5000.00 iops 20000 KB/s (0)"),
        (1, 1, 0, 1_000_000, "1 tests, 1 failures 1.00 iops 0 KB/s (0)"),
        (3, 0, 3 << 20, 2_000_000, "3 tests, 0 failures 1.50 iops 1536 KB/s (0)"),
        (1, 0, 1023, 3_000_000, "1 tests, 0 failures 0.33 iops 0 KB/s (0)"),
        (0, 0, 0, 0, "0 tests, 0 failures 0.00 iops 0 KB/s (0)"),
    ],
)
def test_the_summary_line_is_the_kernels(
    tests: int, failures: int, moved: int, runtime_us: int, text: str
) -> None:
    result = Result("dma0chan0-copy0", tests, failures, 0, moved, runtime_us)
    assert result.summary == f"dmatest: dma0chan0-copy0: summary {text}"
