"""What words and messages are called: by tables linked by hand, the manual's offsets, frames on a wire."""

from __future__ import annotations

import msgpack
import pytest

from iommufdd.unit_memory import STRUCTURES_START
from protocol.hostmem import LOW_RAM_START
from protocol.rpc.session import Kind, header
from protocol.units import PAGE_SIZE
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watch import Structure, Watch
from simulator.ghost.violation import Verdicts
from simulator.names import Messages, Names

ROOT, UPPER, LOWER = (LOW_RAM_START + n * PAGE_SIZE for n in range(3))
RWX = 7


@pytest.fixture
def watch() -> Watch:
    return Watch(Ghost(Verdicts()))


def word(table: int, index: int) -> int:
    """Of kvmd's tables, which begin there."""
    return (table - LOW_RAM_START) // 8 + index


def test_a_table_entry_is_called_by_what_it_translates_now(watch: Watch) -> None:
    names, ghost = Names(watch), watch.ghost
    ghost.root_made(ROOT, 3, None, "vm0")
    ghost.entry_stored(ROOT + 8 * 2, UPPER | RWX)
    ghost.entry_stored(UPPER + 8 * 3, LOWER | RWX)
    told = [names.of_word("kvmd.tdp-tables0", word(*place)) for place in ((ROOT, 2), (UPPER, 3), (LOWER, 4))]
    assert told == ["PDPTE of gpa 0x80000000", "PDE of gpa 0x80600000", "PTE of gpa 0x80604000"]
    ghost.entry_stored(UPPER + 8 * 3, 0)
    assert names.of_word("kvmd.tdp-tables0", word(LOWER, 4)) == f"entry 4 of table {LOWER:#x}, not linked"


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (0x10, "ECAP"),
        (0x18, "GCMD/GSTS"),
        (0x88, "IQT"),
        (0x98, "ICS"),  # [VT-d 11.4]: 4 bytes at 0x9c
        (0xC0, "PQH"),
        (0x800, "register 0x800"),
    ],
)
def test_a_register_is_called_by_its_offset(offset: int, name: str, watch: Watch) -> None:
    for memory in ("device_sim.unit 03", "iommufdd.dmar-stores6"):
        assert Names(watch).of_word(memory, offset // 8) == name


def test_a_structure_is_called_by_entry_and_word(watch: Watch) -> None:
    watch.structures.append(
        Structure(STRUCTURES_START, STRUCTURES_START + PAGE_SIZE, 64, "function 0x6a08 PASID entry")
    )
    told = [Names(watch).of_word("iommufdd.dmar-tables4", word) for word in (9, 512)]
    assert told == ["function 0x6a08 PASID entry 0x1, word 1", "iommufdd.dmar-tables4 word 512"]


def frame(kind: Kind, number: int, body: dict[str, object]) -> bytes:
    raw: bytes = msgpack.packb((number, body))
    return header(kind, len(raw), 0) + raw


def test_a_message_is_called_by_its_operation_and_a_reply_by_what_was_asked() -> None:
    messages = Messages()
    asked = frame(Kind.REQUEST, 7, {"op": "TDP_INVALIDATE"}) + frame(Kind.NOTIFY, 0, {"op": "MSIX"})
    assert messages.named("send", "kvmd.pair1'", asked[:5]) == []
    assert messages.named("send", "kvmd.pair1'", asked[5:]) == ["TDP_INVALIDATE", "MSIX"]
    assert messages.named("recv", "kvmd.pair1'", asked) == ["TDP_INVALIDATE", "MSIX"]
    assert messages.named("send", "kvmd.pair1", frame(Kind.REPLY, 7, {})) == ["reply to TDP_INVALIDATE"]
    assert messages.named("send", "kvmd.pair1", frame(Kind.ERROR, 7, {})) == ["error to TDP_INVALIDATE"]
    assert messages.named("send", "kvmd.pair1", b"\xff" * 8) == ["what is no message"]


def test_the_same_number_on_another_channel_is_another_request() -> None:
    messages = Messages()
    messages.named("send", "a.pair1", frame(Kind.REQUEST, 1, {"op": "ONE"}))
    messages.named("send", "b.pair2", frame(Kind.REQUEST, 1, {"op": "OTHER"}))
    assert messages.named("send", "b.pair2'", frame(Kind.REPLY, 1, {})) == ["reply to OTHER"]
