"""What a frame carries: (id, map), in msgpack, within limits that are checked before anybody looks inside.

Strings and byte strings are as long as a frame lets them be; what is nested or counted is not: recursion,
and work for each item, are ours to pay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgpack

from protocol.errors import MAX_SHOWN_CHARS, PeerError

MAX_DEPTH = 16  # of maps and lists in a body
MAX_LIST_ITEMS = 1 << 16  # a dump's runs (kvmd/core/inspect.py)
MAX_MAP_ITEMS = 1 << 10

MAX_NESTED = 1 << 17  # lists and maps of one body, in all: a dump's runs are lists
SMALL_BYTES = 1 << 14  # has not so many that counting them would be worth its price

_unpack = partial(msgpack.unpackb, max_array_len=MAX_LIST_ITEMS, max_map_len=MAX_MAP_ITEMS, max_ext_len=0)


def decode(raw: memoryview) -> tuple[int, dict[str, Any]]:
    """Raises PeerError."""
    try:
        request_id, body = _unpack(raw) if len(raw) <= SMALL_BYTES else _counted(raw)
    except (ValueError, TypeError) as error:
        why = f"{type(error).__name__} {error}"[:MAX_SHOWN_CHARS]
        raise PeerError(f"body of {len(raw)} bytes is no message: {why}") from None
    if type(request_id) is not int or type(body) is not dict:
        raise PeerError("body is not (id, map)")
    for value in body.values():
        if type(value) is list or type(value) is dict:
            _check_depth(value)
    return request_id, body


def _counted(raw: memoryview) -> Any:
    """Each list has a limit, and many lists have none: a peer would have us build millions."""
    left = MAX_NESTED

    def count(found: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MAX_NESTED} lists and maps")
        return found

    return _unpack(raw, list_hook=count, object_hook=count)


def _check_depth(value: list[Any] | dict[Any, Any]) -> None:
    """Level by level: a recursion would be as deep as the peer likes."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if type(outer) is dict else outer)
            if type(item) is list or type(item) is dict
        ]
        if not level:
            return
    raise PeerError(f"body is nested deeper than {MAX_DEPTH}")
