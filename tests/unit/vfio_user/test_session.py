"""What the fuzzer's oracle does not reach: order of the first message, many windows, who closes what when."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EEXIST, EINVAL, ENOENT, ENOSPC, EOPNOTSUPP

import pytest

from protocol.errors import UapiError
from protocol.flow import Wait
from tests.kit.vfio_user import PlainFunction, ServedClient
from tests.vfio_user import messages
from tests.vfio_user.messages import Sent, dma_map, dma_unmap, version
from vfio_user.core.function import DmaWindow
from vfio_user.core.limits import MAX_DMA_WINDOWS


class WordedClient(ServedClient):
    def __init__(self, *first: Sent) -> None:
        self.function = PlainFunction()
        super().__init__(self.function)
        self.fds: Iterator[int] = (fd for fd in range(100, 100_000) if fd % 5)
        for sent in first:
            assert self.errno(sent) == 0

    def errno(self, sent: Sent) -> int:
        answers = self.receive(sent.data, [next(self.fds) for _ in range(sent.fds)])
        assert len(answers) == 1
        return int.from_bytes(answers[0].data[12:16], "little")


@pytest.fixture
def client() -> WordedClient:
    return WordedClient(version())


def test_the_first_message_is_a_version_and_there_is_one() -> None:
    early = ServedClient(PlainFunction())
    assert early.receive(messages.get_info().data) == []
    assert "not VERSION" in str(early.ended)
    assert WordedClient(version()).errno(version()) == EINVAL


def test_a_client_that_ends_early_leaves_its_fds_closed() -> None:
    early = ServedClient(PlainFunction())
    early.receive(dma_map(0, 4096).data, [101])
    assert early.ended
    assert not early.ledger.open


@pytest.mark.parametrize("number", [6, 14, 16, 17, 18])
def test_what_is_not_offered_is_eopnotsupp(client: WordedClient, number: int) -> None:
    assert client.errno(messages.message(number, bytes(16))) == EOPNOTSUPP


@pytest.mark.parametrize("number", [0, 11, 12, 19, 0xFFFF])
def test_what_is_no_command_of_a_client_is_einval(client: WordedClient, number: int) -> None:
    assert client.errno(messages.message(number, bytes(16))) == EINVAL
    assert str(number) in str(client.refusals[-1])


def test_the_1025th_window_is_enospc_and_any_other_makes_room(client: WordedClient) -> None:
    assert [client.errno(dma_map(n << 12, 4096)) for n in range(MAX_DMA_WINDOWS)] == [0] * MAX_DMA_WINDOWS
    beyond = dma_map(MAX_DMA_WINDOWS << 12, 4096)
    assert client.errno(beyond) == ENOSPC
    assert client.errno(dma_map(0, 4096)) == EEXIST, "what is wrong with it goes before what we lack"
    assert client.errno(dma_unmap(5 << 12, 4096)) == 0
    assert client.errno(beyond) == 0
    assert len(client.ledger.open) == MAX_DMA_WINDOWS


def test_a_window_goes_as_it_came_or_all_go_at_once(client: WordedClient) -> None:
    for start in (0x1000, 0x8000, 0x4000):
        assert client.errno(dma_map(start, 0x2000)) == 0
    assert client.errno(dma_unmap(0x4000, 0x1000)) == ENOENT
    assert client.errno(dma_unmap(0x5000, 0x1000)) == ENOENT
    assert client.errno(dma_unmap(0, 0x10000)) == ENOENT
    assert client.errno(dma_unmap(0x4000, 0x2000)) == 0
    assert len(client.ledger.open) == 2
    assert client.errno(dma_unmap(0, 0, flags=2)) == 0
    assert not client.ledger.open
    assert not client.function.windows


def test_the_last_page_of_all_addresses_is_a_window(client: WordedClient) -> None:
    assert client.errno(dma_map((1 << 64) - 4096, 4096)) == 0
    assert client.errno(dma_map((1 << 64) - 8192, 8192)) == EEXIST
    assert client.errno(dma_map((1 << 64) - 8192, 12288)) == EINVAL


class SlowToLetGo(PlainFunction):
    """DMA of its own reaches a window until somebody says it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.drained: Wait[None] = Wait()

    async def unmap(self, window: DmaWindow) -> None:
        await self.drained
        await super().unmap(window)


def test_an_unmap_is_answered_when_no_dma_reaches_it_any_more() -> None:
    client = WordedClient(version(), dma_map(0, 4096))
    slow = SlowToLetGo()
    slow.windows = client.function.windows
    client.session._function = slow
    sent = dma_unmap(0, 4096).data
    message = client.stream.feed(sent[:16]) or client.stream.feed(sent[16:])
    assert message is not None
    answered = client.start(client.session.handle(message))
    assert not answered.done
    assert len(client.ledger.open) == 1, "its file may still be mapped"
    slow.drained.set(None)
    client.flows.run_ready()
    answer = answered.result()
    assert answer is not None
    assert answer.data[16:] == sent[16:]
    assert not client.ledger.open


class Refuses(PlainFunction):
    async def reset(self) -> None:
        raise UapiError(5, "the silicon is gone")


def test_what_the_function_refuses_the_client_is_told() -> None:
    client = WordedClient(version())
    client.session._function = Refuses()
    assert client.errno(messages.device_reset()) == 5
    assert client.errno(messages.get_info()) == 0
