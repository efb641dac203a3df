"""A DSA's endpoint by its messages: tables in BAR 0, vectors and what is pending, both resets."""

from __future__ import annotations

from errno import EINVAL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.vfio_user import CountedEvent
from tests.kit.vfio_user_dsa import CONFIG, DsaClient
from tests.vfio_user import messages
from tests.vfio_user.messages import EVENTFDS, NONE, dma_map, get_irq_info, get_region_info, set_irqs

TABLE, PENDING, PERMISSIONS = 0x2000, 0x3000, 0x5000


@pytest.fixture
def client() -> DsaClient:
    return DsaClient()


def events(client: DsaClient) -> dict[int, CountedEvent]:
    """Of each vector that has one."""
    found = enumerate(client.endpoint.msix._events)
    return {vector: event for vector, event in found if isinstance(event, CountedEvent)}


def test_a_client_sees_two_bars_config_space_and_nine_msix_vectors(client: DsaClient) -> None:
    answers = [client.ask(get_region_info(index)) for index in range(9)]
    sizes = [int.from_bytes(body[16:24], "little") for _, body in answers]
    assert sizes == [64 << 10, 0, 128 << 10, 0, 0, 0, 0, 4096, 0]
    counts = [client.ask(get_irq_info(index))[1] for index in range(5)]
    assert [int.from_bytes(body[12:16], "little") for body in counts] == [0, 0, 9, 0, 0]


def test_the_msix_table_comes_masked_and_keeps_what_it_has_bits_for(client: DsaClient) -> None:
    for vector in range(9):
        assert client.load(0, TABLE + 16 * vector, 16) == 1 << 96
    client.put(0, TABLE + 16, b"\xff" * 16)
    assert client.load(0, TABLE + 16, 16) == 1 << 96 | (1 << 96) - 1 & ~3
    client.put(0, TABLE + 16 + 12, bytes(4))
    assert client.load(0, TABLE + 16 + 12, 4) == 0
    assert client.load(0, TABLE + 32, 16) == 1 << 96, "its neighbour is what it was"
    assert not any(client.silicon.bars[0]), "none of it is the silicon's"


def test_the_permission_table_keeps_pasid_and_enable(client: DsaClient) -> None:
    for vector in range(9):
        client.put(0, PERMISSIONS + 8 * vector, b"\xff" * 8)
        assert client.load(0, PERMISSIONS + 8 * vector, 8) == 0xFFFFF008
    assert not any(client.silicon.bars[0])


def test_registers_beside_the_tables_are_the_silicons(client: DsaClient) -> None:
    for offset in (0, TABLE - 8, TABLE + 16 * 9, PENDING + 8, PERMISSIONS - 8, PERMISSIONS + 8 * 9):
        client.put(0, offset, b"silicon!")
        assert client.silicon.bars[0][offset : offset + 8] == b"silicon!"


@pytest.mark.parametrize("offset", [TABLE - 4, TABLE + 16 * 9 - 4, PENDING - 1, PERMISSIONS + 8 * 9 - 1])
def test_an_access_across_the_edge_of_a_table_is_refused(client: DsaClient, offset: int) -> None:
    assert client.errno(messages.region_read(0, offset, 8)) == EINVAL
    assert client.errno(messages.region_write(0, offset, bytes(8))) == EINVAL


def test_a_vector_without_an_eventfd_is_pending_until_it_gets_one(client: DsaClient) -> None:
    client.endpoint.msix.raise_vector(3)
    client.endpoint.msix.raise_vector(8)
    assert client.load(0, PENDING, 8) == 1 << 3 | 1 << 8
    client.put(0, PENDING, bytes(8))
    assert client.load(0, PENDING, 8) == 1 << 3 | 1 << 8, "software cannot clear it"
    assert client.errno(set_irqs(EVENTFDS, 3, 2), 101, 102) == 0
    assert {vector: event.signals for vector, event in events(client).items()} == {3: 1, 4: 0}
    assert client.load(0, PENDING, 8) == 1 << 8
    client.endpoint.msix.raise_vector(3)
    assert events(client)[3].signals == 2


def test_a_client_that_goes_leaves_its_vectors_pending_for_the_next(client: DsaClient) -> None:
    assert client.errno(set_irqs(EVENTFDS, 0, 1), 101) == 0
    client.close()
    client.endpoint.msix.raise_vector(0)
    assert client.endpoint.msix.pending.value("Pending") == 1


def test_a_client_may_raise_a_vector_itself(client: DsaClient) -> None:
    assert client.errno(set_irqs(EVENTFDS, 0, 2), 101, 102) == 0
    assert client.errno(set_irqs(NONE, 1, 1)) == 0
    assert [events(client)[vector].signals for vector in (0, 1)] == [0, 1]


@pytest.mark.parametrize("way", ["message", "function level reset"])
def test_a_reset_reaches_everything_but_what_the_client_lent(client: DsaClient, way: str) -> None:
    first = client.load(CONFIG, 0, 4096)
    client.put(CONFIG, 4, b"\x06")
    client.put(0, TABLE, b"\xff" * 8)
    client.put(0, PERMISSIONS, b"\xff" * 8)
    client.endpoint.msix.raise_vector(5)
    assert client.errno(set_irqs(EVENTFDS, 0, 1), 101) == 0
    assert client.errno(dma_map(0, 4096), 102) == 0
    if way == "message":
        assert client.errno(messages.device_reset()) == 0
    else:
        client.put(CONFIG, 0x48, b"\x10\xa8")
    assert client.silicon.resets == 1
    assert client.load(CONFIG, 0, 4096) == first
    assert [client.load(0, at, 8) for at in (TABLE, PENDING, PERMISSIONS)] == [0, 0, 0]
    assert client.ledger.open == {101, 102}
    assert list(events(client)) == [0]
    assert len(client.silicon.windows) == 1


def test_a_reset_of_page_requests_forgets_what_went_wrong(client: DsaClient) -> None:
    client.endpoint.config.store("PRI Status", 0x8003)
    client.put(CONFIG, 0x124, b"\x02\x00")
    assert client.load(CONFIG, 0x126, 2) == 0x8100
    assert client.load(CONFIG, 0x124, 2) == 0
    assert client.silicon.resets == 0


# Every table's begin and end, and both ends of each region.
EDGES = {
    0: [0, TABLE, TABLE + 16 * 9, PENDING, PENDING + 8, PERMISSIONS, PERMISSIONS + 8 * 9, 64 << 10],
    2: [0, 128 << 10],
    CONFIG: [0, 0x48, 0x124, 4096],
}
TABLES = [(TABLE, TABLE + 16 * 9), (PENDING, PENDING + 8), (PERMISSIONS, PERMISSIONS + 8 * 9)]


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """Region, offset, data: about some edge, some of them across it or beyond the end."""
    region = draw(st.sampled_from(sorted(EDGES)))
    offset = max(0, draw(st.sampled_from(EDGES[region])) + draw(st.integers(-20, 20)))
    return region, offset, draw(st.binary(min_size=1, max_size=40))


@given(st.lists(accesses(), max_size=20))
def test_whatever_is_written_where_is_answered_and_lands_there_or_nowhere(
    writes: list[tuple[int, int, bytes]],
) -> None:
    client = DsaClient()
    plain = {0: bytearray(64 << 10), 2: bytearray(128 << 10)}
    sizes = {0: 64 << 10, 2: 128 << 10, CONFIG: 4096}
    for region, offset, data in writes:
        end = offset + len(data)
        touched = [each for each in TABLES if region == 0 and each[0] < end and offset < each[1]]
        whole = not touched or (len(touched) == 1 and touched[0][0] <= offset and end <= touched[0][1])
        errno = 0 if end <= sizes[region] and whole else EINVAL
        assert client.errno(messages.region_write(region, offset, data)) == errno
        assert client.errno(messages.region_read(region, offset, len(data))) == errno
        if not errno and not touched and region != CONFIG:
            plain[region][offset:end] = data
    assert client.silicon.bars == plain
    assert client.load(CONFIG, 0, 4) == 0x0B258086
    for vector in range(9):
        assert client.load(0, TABLE + 16 * vector, 4) & 3 == 0
    assert client.load(0, PENDING, 8) == 0
