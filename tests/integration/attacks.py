"""What a peer can do wrong on a connection, one function each."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable

from tests.integration.plain import ERROR, HEADER, NOTIFY, REPLY, REQUEST, Plain, frame

SEED = 20231202
MAX_BODY = 4 << 20


def files() -> list[int]:
    """Eight fds of one regular file."""
    with tempfile.TemporaryFile() as file:
        return [os.dup(file.fileno()) for _ in range(8)]


# -- attacks: each is given a connection -------------------------------------------------------------------


def random_bytes(peer: Plain) -> None:
    peer.send(random.Random(SEED).randbytes(1 << 16))


def random_bodies(peer: Plain) -> None:
    chance = random.Random(SEED)
    for _ in range(50):
        body = chance.randbytes(chance.randrange(200))
        peer.send(HEADER.pack(len(body), 0, REQUEST) + body)


def half_a_header(peer: Plain) -> None:
    peer.send(b"\x01\x02\x03")


def half_a_frame(peer: Plain) -> None:
    peer.send(frame(REQUEST, 1, {"op": "STATS"})[:-3])


def huge_length(peer: Plain) -> None:
    peer.send(HEADER.pack((1 << 32) - 1, 0, REQUEST) + bytes(1000))


def one_byte_too_long(peer: Plain) -> None:
    peer.send(HEADER.pack(MAX_BODY + 1, 0, REQUEST))


def longest_body_of_nothing(peer: Plain) -> None:
    peer.send(HEADER.pack(MAX_BODY, 0, REQUEST) + bytes(MAX_BODY))


def unknown_kind(peer: Plain) -> None:
    peer.send(HEADER.pack(1, 0, 4) + b"\xc0")


def more_fds_than_a_message_may_have(peer: Plain) -> None:
    fds = files() * 4
    peer.send(frame(REQUEST, 1, {"op": "STATS"}, 32), fds)
    close_all(fds)


def fds_that_nobody_announced(peer: Plain) -> None:
    fds = files()
    for _ in range(20):
        peer.send(frame(REQUEST, 1, {"op": "NO_SUCH"}), fds)
    close_all(fds)


def fds_announced_that_do_not_come(peer: Plain) -> None:
    peer.send(frame(REQUEST, 1, {"op": "STATS"}, 8))


def fds_with_half_a_frame(peer: Plain) -> None:
    fds = files()
    peer.send(frame(REQUEST, 1, {"op": "STATS"}, 8)[:5], fds)
    close_all(fds)


def fds_a_request_does_not_take(peer: Plain) -> None:
    fds = files()
    for number in range(20):
        peer.send(frame(REQUEST, number, {"op": "STATS"}, 8), fds)
        peer.send(frame(REQUEST, 100 + number, {"op": "KVM_CREATE_VM"}, 8), fds)
    close_all(fds)


def fds_with_a_notification(peer: Plain) -> None:
    fds = files()
    peer.send(frame(NOTIFY, 0, {"op": "MOVDIR64B"}, 8), fds)
    close_all(fds)


def bad_msgpack(peer: Plain) -> None:
    peer.send(HEADER.pack(3, 0, REQUEST) + b"\xc1\xff\xff")


def deep_msgpack(peer: Plain) -> None:
    body = b"\x91" * 100_000
    peer.send(HEADER.pack(len(body), 0, REQUEST) + body)


def msgpack_that_promises_too_much(peer: Plain) -> None:
    peer.send(HEADER.pack(5, 0, REQUEST) + b"\xdd\xff\xff\xff\xff")


def no_pair(peer: Plain) -> None:
    peer.send(HEADER.pack(1, 0, REQUEST) + b"\x05")


def wrong_types(peer: Plain) -> None:
    wrong: list[object] = [None, True, -1, 1 << 63, 1.5, "x" * 10_000, b"x", [], [[]], {}, {"a": 1}]
    number = 0
    for op in ("OPEN", "LINK", "QI", "KVM_RUN", "MMAP", "IOMMU_HWPT_ALLOC", "TDP_FAULT", "WQ_CONFIG"):
        for value in wrong:
            for key in ("path", "addr", "size", "program", "descriptors", "dev_id", "gfn", "extra"):
                number += 1
                peer.send(frame(REQUEST, number, {"op": op, key: value}))
    for value in wrong:
        number += 1
        peer.send(frame(REQUEST, number, {"op": value}))


def ids_that_are_no_ids(peer: Plain) -> None:
    peer.send(frame(REQUEST, "one", {"op": "STATS"}))


def keys_that_are_no_names(peer: Plain) -> None:
    peer.send(frame(REQUEST, 1, {1: 2, b"op": 3, "op": "STATS"}))


def ids_used_again(peer: Plain) -> None:
    for _ in range(50):
        peer.send(frame(REQUEST, 7, {"op": "STATS"}) * 2)


def replies_to_nothing(peer: Plain) -> None:
    peer.send(frame(REPLY, 1, {}))


def errors_to_nothing(peer: Plain) -> None:
    peer.send(frame(ERROR, 9, {"errno": "x", "why": 5}))


def notifications_nobody_takes(peer: Plain) -> None:
    peer.send(frame(NOTIFY, 0, {"op": "STATS"}))


def ten_thousand_requests_and_no_reading(peer: Plain) -> None:
    for start in range(0, 10_000, 100):
        peer.send(b"".join(frame(REQUEST, 1 + start + n, {"op": "STATS"}) for n in range(100)))


def one_byte_at_a_time(peer: Plain) -> None:
    for byte in frame(REQUEST, 1, {"op": "STATS"}):
        peer.send(bytes([byte]))


def nothing(peer: Plain) -> None:
    """Connect, hang up."""


ATTACKS: list[Callable[[Plain], None]] = [
    random_bytes,
    random_bodies,
    half_a_header,
    half_a_frame,
    huge_length,
    one_byte_too_long,
    longest_body_of_nothing,
    unknown_kind,
    more_fds_than_a_message_may_have,
    fds_that_nobody_announced,
    fds_announced_that_do_not_come,
    fds_with_half_a_frame,
    fds_a_request_does_not_take,
    fds_with_a_notification,
    bad_msgpack,
    deep_msgpack,
    msgpack_that_promises_too_much,
    no_pair,
    wrong_types,
    ids_that_are_no_ids,
    keys_that_are_no_names,
    ids_used_again,
    replies_to_nothing,
    errors_to_nothing,
    notifications_nobody_takes,
    ten_thousand_requests_and_no_reading,
    one_byte_at_a_time,
    nothing,
]
BREACHES = [  # each of these must cost the peer its connection
    huge_length,
    one_byte_too_long,
    longest_body_of_nothing,
    unknown_kind,
    more_fds_than_a_message_may_have,
    fds_announced_that_do_not_come,
    bad_msgpack,
    deep_msgpack,
    msgpack_that_promises_too_much,
    no_pair,
    ids_that_are_no_ids,
    replies_to_nothing,
    errors_to_nothing,
    notifications_nobody_takes,
]


def close_all(fds: list[int]) -> None:
    for fd in set(fds):
        os.close(fd)
