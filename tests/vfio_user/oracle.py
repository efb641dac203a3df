"""What a server must answer, written a second time and slowly: lists searched from end to end.

Knows nothing of the server's code, its layouts are literal; the function behind it is the kit's, whose sizes
and refusals it is told.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, ENOENT, ENOMEM, ENOSPC, ENOTTY, EOPNOTSUPP
from typing import Any

from tests.kit.vfio_user import AREAS, FILE_FD, FIVE, READ_ONLY, SIZES, TOO_LARGE, VECTORS

OURS = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 1024,
    "pgsizes": 4096,
    "write_multiple": True,
}
IRQS = [0, 0, VECTORS, 0, 0]


class End(Exception):
    """The client is hung up on."""


class Refused(Exception):
    def __init__(self, errno: int) -> None:
        self.errno = errno


def need(holds: bool, errno: int = EINVAL) -> None:
    if not holds:
        raise Refused(errno)


@dataclass
class Oracle:
    greeted: bool = False
    multi: bool = False
    windows: list[tuple[int, int, int | None]] = field(default_factory=list)  # start, size, fd
    events: list[int | None] = field(default_factory=lambda: [None] * VECTORS)
    triggered: list[int] = field(default_factory=lambda: [0] * VECTORS)
    memory: dict[int, bytearray] = field(default_factory=lambda: {n: bytearray(SIZES[n]) for n in SIZES})
    resets: int = 0
    stream: bytes = b""
    fds: dict[int, list[int]] = field(default_factory=dict)  # by where in the stream

    def receive(self, data: bytes, fds: list[int]) -> list[tuple[bytes, tuple[int, ...]]]:
        """The answers; `End` with those that came before it in its arguments."""
        if fds:
            self.fds[len(self.stream)] = fds
        self.stream += data
        answers: list[tuple[bytes, tuple[int, ...]]] = []
        while True:
            here = [fd for at in sorted(self.fds) if at < 16 for fd in self.fds[at]]
            if len(here) > 16:
                raise End(answers)
            if len(self.stream) < 16:
                return answers
            size, flags = struct.unpack_from("<II", self.stream, 4)
            if flags not in (0, 0x10) or not 16 <= size <= 16 + (1 << 20) + 16:
                raise End(answers)
            if any(at >= 16 and at < size for at in self.fds):
                raise End(answers)
            if len(self.stream) < size:
                return answers
            try:
                answer = self.answer(self.stream[:size], here)
            except End:
                raise End(answers) from None
            answers += [answer] if not flags & 0x10 else []
            self.stream = self.stream[size:]
            self.fds = {at - size: those for at, those in self.fds.items() if at >= size}

    def open_fds(self) -> set[int]:
        held = {fd for _, _, fd in self.windows if fd is not None} | {
            fd for fd in self.events if fd is not None
        }
        return held | {fd for those in self.fds.values() for fd in those}

    def answer(self, raw: bytes, fds: list[int]) -> tuple[bytes, tuple[int, ...]]:
        message_id, number = struct.unpack_from("<HH", raw)
        body, with_it = raw[16:], tuple[int, ...]()
        if not self.greeted and number != 1:
            raise End
        if not self.greeted:
            payload, errno = self.version(body), 0
        else:
            try:
                payload, errno = self.perform(number, body, fds), 0
                if number == 5 and body[8] == 2 and len(payload) > 32:
                    with_it = (FILE_FD,)
            except Refused as refused:
                payload, errno = b"", refused.errno
        flags = 1 | (0x20 if errno else 0)
        return struct.pack("<HHIII", message_id, number, 16 + len(payload), flags, errno) + payload, with_it

    def version(self, body: bytes) -> bytes:
        proposed: Any = {}
        if len(body) < 4 or struct.unpack_from("<H", body)[0] != 0:
            raise End
        if body[4:]:
            if body[-1] or len(body) > 4100:
                raise End
            try:
                proposed = json.loads(body[4:-1])
            except (ValueError, RecursionError):
                raise End from None
            if not isinstance(proposed, dict):
                raise End
            proposed = proposed.get("capabilities", {})
            if not isinstance(proposed, dict):
                raise End
        multi = proposed.get("write_multiple", False)
        if multi is not True and multi is not False:
            raise End
        self.greeted, self.multi = True, multi
        answer = {k: v for k, v in OURS.items() if k in proposed and (k != "write_multiple" or multi)}
        return bytes(4) + json.dumps({"capabilities": answer}).replace(" ", "").encode() + b"\0"

    def perform(self, number: int, body: bytes, fds: list[int]) -> bytes:
        need(number not in (6, 14, 16, 17, 18), EOPNOTSUPP)
        need(number in (2, 3, 4, 5, 7, 8, 9, 10, 13, 15))
        need(not fds or number in (2, 8))
        if number == 2:
            return self.dma_map(body, fds)
        if number == 3:
            return self.dma_unmap(body)
        if number == 4:
            need(len(body) == 16 and body[:4] >= b"" and int.from_bytes(body[:4], "little") >= 16)
            need(not any(body[4:]))
            return struct.pack("<IIII", 16, 3, 9, 5)
        if number == 5:
            return self.region_info(body)
        if number == 7:
            need(len(body) == 16 and int.from_bytes(body[:4], "little") >= 16)
            index = int.from_bytes(body[8:12], "little")
            need(not any(body[4:8]) and not any(body[12:]) and index < 5)
            return struct.pack("<IIII", 16, 1 if IRQS[index] else 0, index, IRQS[index])
        if number == 8:
            return self.set_irqs(body, fds)
        if number == 13:
            need(not body)
            self.resets += 1
            return b""
        return self.access(number, body)

    def dma_map(self, body: bytes, fds: list[int]) -> bytes:
        need(len(body) == 32)
        argsz, flags, offset, start, size = struct.unpack("<IIQQQ", body)
        need(argsz >= 32 and flags in (1, 2, 3) and len(fds) <= 1)
        need(size > 0 and start % 4096 == size % 4096 == offset % 4096 == 0)
        need(start + size <= 1 << 64 and offset + size <= 1 << 63 and (offset == 0 or bool(fds)))
        need(not any(start < s + n and s < start + size for s, n, _ in self.windows), EEXIST)
        need(len(self.windows) < 1024, ENOSPC)
        need(size < TOO_LARGE, ENOMEM)
        self.windows.append((start, size, fds[0] if fds else None))
        return b""

    def dma_unmap(self, body: bytes) -> bytes:
        need(len(body) == 24)
        argsz, flags, start, size = struct.unpack("<IIQQ", body)
        need(argsz >= 24 and flags in (0, 2) and (flags == 0 or start == size == 0))
        going = [each for each in self.windows if flags or each[:2] == (start, size)]
        need(bool(going) or bool(flags), ENOENT)
        self.windows = [each for each in self.windows if each not in going]
        return body

    def region_info(self, body: bytes) -> bytes:
        need(len(body) == 32)
        argsz, flags, index, cap, size, offset = struct.unpack("<IIIIQQ", body)
        need(argsz >= 32 and not (flags or cap or size or offset) and index < 9)
        has = SIZES.get(index, 0)
        flags = (3 if index != READ_ONLY else 1) if has else 0
        if index != 2:
            return struct.pack("<IIIIQQ", 32, flags, index, 0, has, 0)
        needed = 32 + 16 + 16 * len(AREAS)
        flags |= 4 | 8
        if argsz < needed:
            return struct.pack("<IIIIQQ", needed, flags, 2, 0, has, 0x4000)
        chain = struct.pack("<HHIII", 1, 1, 0, len(AREAS), 0) + b"".join(
            struct.pack("<QQ", *a) for a in AREAS
        )
        return struct.pack("<IIIIQQ", needed, flags, 2, 32, has, 0x4000) + chain

    def set_irqs(self, body: bytes, fds: list[int]) -> bytes:
        need(len(body) >= 20)
        argsz, flags, index, start, count = struct.unpack_from("<IIIII", body)
        data, action, given = flags & 7, flags & 0x38, body[20:]
        need(argsz == len(body) and flags < 64 and data in (1, 2, 4) and action in (8, 16, 32))
        need(len(given) == (count if data == 2 else 0))
        need(index < 5 and len(fds) <= (count if data == 4 else 0))
        if data == 1 and action == 32 and start == count == 0:
            self.events = [None] * VECTORS if index == 2 else self.events
            return b""
        need(count > 0 and start + count <= IRQS[index])
        need(action == 32, ENOTTY)
        if data == 4:
            need(all(fd % FIVE for fd in fds))
            self.events[start : start + count] = [*fds, *[None] * (count - len(fds))]
            return b""
        for n in range(count):
            self.triggered[start + n] += 1 if data == 1 or given[n] else 0
        return b""

    def access(self, number: int, body: bytes) -> bytes:
        if number == 15:
            need(self.multi, EOPNOTSUPP)
            need(len(body) >= 8)
            count = int.from_bytes(body[:8], "little")
            need(count <= 200 and len(body) == 8 + 24 * count)
            rows = [struct.unpack_from("<QII8s", body, 8 + 24 * n) for n in range(count)]
            for _, _, length, _ in rows:
                need(length <= 8)
            for offset, region, length, _ in rows:
                self.check(offset, region, length, write=True)
            for offset, region, length, data in rows:
                self.memory[region][offset : offset + length] = data[:length]
            return body[:8]
        need(len(body) >= 16 and (number == 10 or len(body) == 16))
        offset, region, length = struct.unpack_from("<QII", body)
        need(number == 9 or len(body) == 16 + length)
        self.check(offset, region, length, write=number == 10)
        if number == 9:
            return body + bytes(self.memory[region][offset : offset + length])
        self.memory[region][offset : offset + length] = body[16:]
        return body[:16]

    def check(self, offset: int, region: int, length: int, *, write: bool) -> None:
        need(region < 9 and 0 < length <= 1 << 20)
        need(offset + length <= SIZES.get(region, 0))
        need(not write or region != READ_ONLY)
