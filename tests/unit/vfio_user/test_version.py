"""What is agreed on, and who is hung up on."""

from __future__ import annotations

import json
import struct

import pytest

from protocol.errors import PeerError
from tests.vfio_user import messages
from vfio_user.core.version import negotiate


def proposed(text: str | bytes, *, major: int = 0, minor: int = 0) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<HH", major, minor) + raw + b"\0"


def agreed(body: bytes) -> dict[str, object]:
    answer = negotiate(body).answer
    assert answer[:4] == bytes(4)
    assert answer.endswith(b"\0")
    found: dict[str, object] = json.loads(answer[4:-1])["capabilities"]
    return found


def test_qemu_gets_the_limits_it_asked_for_and_no_migration() -> None:
    assert agreed(messages.version().data[16:]) == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "max_dma_maps": 1024,
        "pgsizes": 4096,
        "write_multiple": True,
    }


def test_a_client_that_names_nothing_gets_nothing() -> None:
    for body in (bytes(4), proposed("{}"), proposed('{"capabilities":{}}'), proposed('{"other":1}')):
        assert agreed(body) == {}
        assert not negotiate(body).write_multiple


def test_a_later_minor_version_is_answered_with_ours() -> None:
    assert agreed(proposed("{}", minor=9)) == {}


def test_write_multiple_is_agreed_on_only_if_it_is_wanted() -> None:
    assert agreed(proposed('{"capabilities":{"write_multiple":false}}')) == {}
    assert negotiate(proposed('{"capabilities":{"write_multiple":true}}')).write_multiple


@pytest.mark.parametrize(
    "body",
    [
        b"\0\0\0",
        proposed("{}", major=1),
        proposed("{")[:-1],
        proposed("{"),
        proposed("[]"),
        proposed('"text"'),
        proposed(b"\xff\xfe{}"),
        proposed('{"capabilities":[]}'),
        proposed('{"capabilities":{"write_multiple":1}}'),
        proposed("[" * 4000),
        proposed("1" * 4095),
        proposed('{"a":"' + "x" * 4096 + '"}'),
    ],
    ids=range(12),
)
def test_what_is_malformed_or_too_new_ends_the_client(body: bytes) -> None:
    with pytest.raises(PeerError):
        negotiate(body)
