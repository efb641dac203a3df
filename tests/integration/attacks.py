"""What a peer can do wrong on a connection, one function each."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import tempfile
from collections.abc import Callable

from tests.integration.plain import ERROR, HEADER, NOTIFY, REPLY, REQUEST, Plain, frame
from tests.kit.daemons import state_of, until

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


def own_fd_in_half_a_frame(peer: Plain) -> None:
    """Its own connection's: who hangs up then leaves a copy behind, that keeps it."""
    own = peer.copy()
    peer.send(frame(REQUEST, 1, {"op": "STATS"}, 1)[:9], [own])
    os.close(own)


def fds_that_sleep_in_close(peer: Plain) -> None:
    for number in range(4):
        _give(peer, frame(REQUEST, number, {"op": ("STATS", "NO_SUCH")[number % 2]}, 1), [lingering(peer)])


def fds_that_sleep_in_close_with_half_a_frame(peer: Plain) -> None:
    fds = [lingering(peer) for _ in range(9)]  # one more than a frame may have
    _give(peer, frame(REQUEST, 1, {"op": "STATS"}, 8)[:9], fds)


def fds_that_sleep_in_close_in_the_queue_of_a_socket(peer: Plain) -> None:
    """Nobody receives them: they are closed with the socket they are in."""
    one, other = socket.socketpair()
    fd = lingering(peer)
    socket.send_fds(one, [b"x"], [fd])
    one.close()
    os.close(fd)
    _give(peer, frame(REQUEST, 1, {"op": "NO_SUCH"}, 1), [other.detach()])


def fds_that_sleep_in_close_in_its_own_queue(peer: Plain) -> None:
    """It hangs up before it has read the second frame."""
    fds = [lingering(peer), lingering(peer)]
    first = HEADER.pack((1 << 32) - 1, 0, REQUEST)
    _give(peer, first, fds[:1], frame(REQUEST, 2, {"op": "STATS"}, 1), fds[1:])


def _give(
    peer: Plain, data: bytes, fds: list[int], more: bytes = b"", more_fds: list[int] | None = None
) -> None:
    """Send them so that theirs is the last copy, whoever is quick."""
    daemon = struct.unpack("3i", peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    os.kill(daemon, signal.SIGSTOP)
    try:
        until(lambda: state_of(daemon) == "T", "the daemon has stopped")
        peer.send(data, fds)
        if more:
            peer.send(more, more_fds)
        close_all([*fds, *(more_fds or [])])
    finally:
        os.kill(daemon, signal.SIGCONT)


def lingering(peer: Plain) -> int:
    """A TCP socket whose last close sleeps for an hour, or until `peer` is closed: unsent data, SO_LINGER."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer.held.append(server.accept()[0])
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 20))
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    return client.detach()


def nesting_at_every_depth(peer: Plain) -> None:
    for depth in (10, 15, 16, 17, 100):
        peer.send(frame(REQUEST, depth, {"op": "STATS", "x": nested(depth)}))


def nesting_as_deep_as_msgpack_goes(peer: Plain) -> None:
    inner = b"\x91" * 1000 + b"\x01"
    body = b"\x92\x01\x82\xa2op\xa5STATS\xa1x" + inner
    peer.send(HEADER.pack(len(body), 0, REQUEST) + body)


def lists_and_maps_without_end(peer: Plain) -> None:
    peer.send(frame(REQUEST, 1, {"op": "STATS", "x": [0] * (1 << 20)}))


def more_keys_than_any_message_has(peer: Plain) -> None:
    peer.send(frame(REQUEST, 1, {"op": "STATS", **{str(n): n for n in range(1000)}}))


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


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
    own_fd_in_half_a_frame,
    fds_that_sleep_in_close,
    fds_that_sleep_in_close_with_half_a_frame,
    fds_that_sleep_in_close_in_the_queue_of_a_socket,
    fds_that_sleep_in_close_in_its_own_queue,
    nesting_at_every_depth,
    nesting_as_deep_as_msgpack_goes,
    lists_and_maps_without_end,
    more_keys_than_any_message_has,
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
