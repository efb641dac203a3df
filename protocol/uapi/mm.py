"""What a process's address space answers: its own system calls, and what the host does to its memory.

Addresses are host virtual, sizes bytes; names and arguments are those of the
system call.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi.message import MAX_TRANSFER, U64, Message


class Mmap(Message):
    """Anonymous private memory backed by pages of `page_size`; addr None: anywhere."""

    addr: U64 | None = None
    size: U64
    prot: Literal["r", "rw", "none"] = "rw"
    page_size: Literal[4096, 2097152, 1073741824] = 4096


class Munmap(Message):
    addr: U64
    size: U64


class Madvise(Message):
    addr: U64
    size: U64
    advice: Literal["dontneed"]


class MovePages(Message):
    """Migrate every present page of the range to another frame."""

    addr: U64
    size: U64


class MmRead(Message):
    """What the process itself reads at `addr`."""

    addr: U64
    size: Annotated[int, Field(ge=0, le=MAX_TRANSFER)]


class MmWrite(Message):
    addr: U64
    data: Annotated[bytes, Field(max_length=MAX_TRANSFER)]
