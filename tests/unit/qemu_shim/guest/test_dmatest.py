"""dmatest: its patterns byte for byte, what it notices, its parameters, and the lines it prints."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from random import Random

import pytest

from protocol.errors import UapiError
from protocol.hw.dsa import CompletionRecord, Status
from qemu_shim.guest.dmatest import (
    PATTERN_DST,
    PATTERN_OVERWRITE,
    DmatestParams,
    Result,
    Thread,
    counted,
    source_pattern,
)
from tests.unit.qemu_shim.guest.guests import PAGE, CopyChannel, Ram

NAME = "dma0chan0-copy0"


def ticks(step_ns: int) -> Iterator[int]:
    now = 0
    while True:
        yield now
        now += step_ns


async def run(
    channel: CopyChannel, *, iterations: int = 1, buf_size: int = PAGE, step_ns: int = 100_000, **params: int
) -> Result:
    clock = ticks(step_ns)
    given = {"norandom": True, "verbose": True, **params}
    thread = Thread(
        NAME,
        channel,
        channel.ram.memory(),
        lambda: next(clock),
        DmatestParams(iterations=iterations, test_buf_size=buf_size, **given),  # type: ignore[arg-type]
        Random(7),
    )
    return await thread.run()


def to_be_overwritten(size: int) -> bytes:
    """A destination that no copy has touched."""
    return counted(PATTERN_DST | PATTERN_OVERWRITE, 0, size)


# -- patterns ------------------------------------------------------------------------------------------


def test_the_source_pattern_counts_down_from_df_to_c0_and_again() -> None:
    assert source_pattern(34).hex() == (
        "dfdedddcdbdad9d8d7d6d5d4d3d2d1d0cfcecdcccbcac9c8c7c6c5c4c3c2c1c0dfde"
    )


def test_the_destination_pattern_counts_down_from_3f_to_20_and_again() -> None:
    assert to_be_overwritten(34).hex() == (
        "3f3e3d3c3b3a393837363534333231302f2e2d2c2b2a292827262524232221203f3e"
    )


async def test_outside_the_transfer_buffers_carry_other_bits() -> None:
    """Source 0x80, destination 0; inside 0x40 more, or 0x20 more before and the source's counter after."""
    channel = CopyChannel(Ram())
    seen: list[bytes] = []

    def look(number: int) -> None:
        dst, src, _ = channel.moves[-1]
        seen.append(bytes(channel.ram.bytes[src - src % PAGE : src - src % PAGE + PAGE]))
        seen.append(bytes(channel.ram.bytes[dst - dst % PAGE : dst - dst % PAGE + PAGE]))

    channel.spoil = look
    result = await run(channel, iterations=20, norandom=0)
    assert result.failures == 0
    for number, (dst, src, size) in enumerate(channel.moves):
        source, target = seen[2 * number : 2 * number + 2]
        src_off, dst_off = src % PAGE, dst % PAGE
        for i in range(PAGE):
            inside = src_off <= i < src_off + size
            assert source[i] == (0x80 | 0x40 * inside | ~i & 0x1F)
            copied = dst_off <= i < dst_off + size
            assert target[i] == (0xC0 | ~(i - dst_off + src_off) & 0x1F if copied else ~i & 0x1F)


async def test_a_memset_writes_one_value_everywhere() -> None:
    channel = CopyChannel(Ram())
    result = await run(channel, iterations=3, dmatest=1, norandom=0)
    assert (result.tests, result.failures) == (3, 0)
    assert {pattern for _, pattern, _ in channel.moves} == {0xDEDE_DEDE_DEDE_DEDE}


# -- what it notices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("buf_size", [1, 64, PAGE, 2 * PAGE + 5])
async def test_a_channel_that_copies_passes_and_every_byte_was_looked_at(buf_size: int) -> None:
    channel = CopyChannel(Ram())
    result = await run(channel, iterations=3, buf_size=buf_size)
    assert (result.tests, result.failures, result.code) == (3, 0, 0)
    assert result.bytes_verified == 3 * 2 * buf_size
    assert result.total_len == 3 * buf_size
    dst, src, _ = channel.moves[0]
    assert channel.moves == [(dst, src, buf_size)] * 3
    assert src % PAGE == dst % PAGE == 0
    assert abs(src - dst) >= buf_size
    assert channel.ram.bytes[dst : dst + buf_size] == source_pattern(buf_size)


async def test_a_channel_that_does_nothing_fails_on_every_byte() -> None:
    channel = CopyChannel(Ram())

    def undo(number: int) -> None:
        dst, _, size = channel.moves[-1]
        channel.ram.bytes[dst : dst + size] = to_be_overwritten(size)

    channel.spoil = undo
    result = await run(channel, iterations=2, buf_size=64)
    assert (result.tests, result.failures) == (2, 2)
    assert result.lines[0] == f"dmatest: {NAME}: dstbuf[0x0] not copied! Expected df, got 3f"
    assert result.lines[32] == f"dmatest: {NAME}: 32 errors suppressed"
    assert result.lines[-1].endswith("'data error' with src_off=0x0 dst_off=0x0 len=0x40 (64)")


@pytest.mark.parametrize(("side", "text"), [("srcbuf", "overwritten!"), ("dstbuf", "mismatch!")])
@pytest.mark.parametrize("at", [0, 100, PAGE - 1])
async def test_one_wrong_byte_on_either_side_is_found_and_counted(side: str, text: str, at: int) -> None:
    channel = CopyChannel(Ram())

    def flip(number: int) -> None:
        dst, src, _ = channel.moves[-1]
        if number == 2:
            channel.ram.bytes[(src if side == "srcbuf" else dst) + at] ^= 0x01

    channel.spoil = flip
    result = await run(channel, iterations=3)
    good = source_pattern(PAGE)[at]
    assert result.failures == 1
    assert result.lines == [
        f"dmatest: {NAME}: result #1: 'test passed' with src_off=0x0 dst_off=0x0 len=0x1000 (0)",
        f"dmatest: {NAME}: {side}[{at:#x}] {text} Expected {good:02x}, got {good ^ 1:02x}",
        f"dmatest: {NAME}: result #2: 'data error' with src_off=0x0 dst_off=0x0 len=0x1000 (1)",
        f"dmatest: {NAME}: result #3: 'test passed' with src_off=0x0 dst_off=0x0 len=0x1000 (0)",
    ]


async def test_a_byte_copied_beyond_the_end_is_found() -> None:
    channel = CopyChannel(Ram())

    def overrun(number: int) -> None:
        dst, _, size = channel.moves[-1]
        channel.ram.bytes[dst + size] = 0xDF

    channel.spoil = overrun
    result = await run(channel, transfer_size=64)
    assert result.lines[0] == f"dmatest: {NAME}: dstbuf[0x40] was copied! Expected 1f, got df"
    assert result.failures == 1


async def test_a_completion_error_is_a_failure_whose_data_nobody_looks_at() -> None:
    channel = CopyChannel(Ram())
    channel.status = lambda number: Status.PAGE_FAULT_IR if number == 1 else Status.SUCCESS
    result = await run(channel, iterations=2)
    assert (result.tests, result.failures, result.bytes_verified) == (2, 1, 2 * PAGE)
    assert result.lines[0] == f"dmatest: {NAME}: PAGE_FAULT_IR at 0x0"
    assert result.lines[1].endswith("'completion error status' with src_off=0x0 dst_off=0x0 len=0x1000 (0)")
    assert "'test passed'" in result.lines[2]


async def test_a_queue_that_takes_nothing_is_a_submit_error_with_its_errno() -> None:
    class Full(CopyChannel):
        async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
            raise UapiError(11, "full")

    result = await run(Full(Ram()))
    assert result.lines[0].endswith("'submit error' with src_off=0x0 dst_off=0x0 len=0x1000 (-11)")


async def test_a_transfer_that_does_not_come_back_is_timed_out() -> None:
    async def never(done: Awaitable[CompletionRecord], timeout_ms: int) -> CompletionRecord | None:
        await done
        return None

    channel = CopyChannel(Ram())
    params = DmatestParams(iterations=2, norandom=True)
    result = await Thread(NAME, channel, channel.ram.memory(), lambda: 0, params, Random(0), never).run()
    assert result.failures == 2
    assert "'test timed out' with src_off=0x0 dst_off=0x0 len=0x4000 (0)" in result.lines[0]


async def test_buffers_are_filled_anew_for_every_test() -> None:
    """The planted bug: a device that copies the first time only."""
    channel = CopyChannel(Ram())

    def forget(number: int) -> None:
        dst, _, size = channel.moves[-1]
        if number > 1:
            channel.ram.bytes[dst : dst + size] = to_be_overwritten(size)

    channel.spoil = forget
    assert (await run(channel, iterations=3)).failures == 2


# -- parameters ----------------------------------------------------------------------------------------


async def test_random_lengths_and_offsets_are_aligned_and_stay_inside() -> None:
    channel = CopyChannel(Ram())
    result = await run(channel, iterations=200, norandom=0, alignment=6, verbose=0)
    assert (result.failures, result.lines) == (0, [])
    assert len({size for _, _, size in channel.moves}) > 20
    for dst, src, size in channel.moves:
        assert 0 < size <= PAGE
        assert size % 64 == dst % 64 == src % 64 == 0
        assert (src % PAGE) + size <= PAGE
        assert (dst % PAGE) + size <= PAGE


async def test_a_transfer_size_is_taken_as_it_is() -> None:
    channel = CopyChannel(Ram())
    await run(channel, iterations=50, norandom=0, alignment=6, transfer_size=100)
    assert {size for _, _, size in channel.moves} == {100}
    assert len({src for _, src, _ in channel.moves}) > 5


async def test_without_verification_nothing_is_filled_or_looked_at() -> None:
    channel = CopyChannel(Ram())
    channel.spoil = lambda number: None
    result = await run(channel, iterations=3, noverify=1)
    assert (result.failures, result.bytes_verified, channel.ram.batches) == (0, 0, [])


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"transfer_size": PAGE}, "transfer_size 4096 is not less than test_buf_size 4096"),
        ({"alignment": 13}, "4096-byte buffer too small for 8192-byte alignment"),
    ],
)
async def test_parameters_that_cannot_be_end_the_thread(params: dict[str, int], text: str) -> None:
    result = await run(CopyChannel(Ram()), **params)
    assert result.lines == [f"dmatest: {NAME}: {text}"]
    assert result.summary.endswith("summary 0 tests, 0 failures 0.00 iops 0 KB/s (-22)")


# -- time ----------------------------------------------------------------------------------------------


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
    result = Result(NAME, tests, failures, 0, moved, runtime_us)
    assert result.summary == f"dmatest: {NAME}: summary {text}"
