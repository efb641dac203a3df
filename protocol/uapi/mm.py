"""What a process's address space answers: its own system calls, and what the host does to its memory.

Addresses are host virtual, sizes bytes; names and arguments are those of the system call.  The objects that
come of it, memory files and userfaultfds, answer on fds of their own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi.message import MAX_TRANSFER, S64, U64, Message, Name

Data = Annotated[bytes, Field(max_length=MAX_TRANSFER)]
Count = Annotated[int, Field(ge=0, le=MAX_TRANSFER)]
Protection = Literal["none", "r", "w", "rw"]


class Mmap(Message):
    """Memory in pages of `page_size`; addr None: anywhere.  For a file's kinds its fd comes along."""

    addr: U64 | None = None
    size: U64
    prot: Protection = "rw"
    kind: Literal["anon", "anon_shared", "file_shared", "file_private"] = "anon"
    fixed: bool = False
    offset: U64 = 0
    page_size: Literal[4096, 2097152, 1073741824] = 4096


class Munmap(Message):
    addr: U64
    size: U64


class Mprotect(Message):
    addr: U64
    size: U64
    prot: Protection


class Mremap(Message):
    """MREMAP_MAYMOVE; with `new_addr` MREMAP_FIXED.  The reply says where."""

    addr: U64
    old_size: U64
    new_size: U64
    new_addr: U64 | None = None


class Madvise(Message):
    addr: U64
    size: U64
    advice: Literal[
        "dontneed", "remove", "free", "hugepage", "nohugepage", "mergeable", "collapse", "pageout"
    ]


class MovePages(Message):
    """Migrate every present page of the range to another frame."""

    addr: U64
    size: U64


class HostAction(Message):
    """What the host does to the range on its own; the reply says to how many pages."""

    action: Literal["swap_out", "migrate", "merge", "numa_hint", "poison", "collapse", "split", "age"]
    addr: U64
    size: U64


class Pagemap(Message):
    """What is present in the range: pages by size, pages in swap, KiB of transparent huge pages."""

    addr: U64
    size: U64


class Fork(Message):
    """The reply carries the fd of the child's address space; closing it is the child's exit."""


class MmRead(Message):
    """What the process itself reads at `addr`."""

    addr: U64
    size: Count


class MmWrite(Message):
    addr: U64
    data: Data


class MemfdCreate(Message):
    """The reply carries the file's fd."""

    name: Name
    size: U64 = 0


class Ftruncate(Message):
    """`size` is a loff_t, as are the offsets below."""

    size: S64


class PunchHole(Message):
    """fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""

    offset: S64
    size: S64


class Pread(Message):
    offset: U64
    size: Count


class Pwrite(Message):
    offset: U64
    data: Data


class CreateUserfaultfd(Message):
    """The reply carries the userfaultfd."""

    user_mode_only: bool = False


class UffdioRegister(Message):
    start: U64
    len: U64
    mode: Literal["missing", "wp", "missing+wp"]


class UffdioUnregister(Message):
    start: U64
    len: U64


class UffdioCopy(Message):
    """`data` in whole pages; `wp`: UFFDIO_COPY_MODE_WP."""

    dst: U64
    data: Data
    wp: bool = False


class UffdioZeropage(Message):
    start: U64
    len: U64


class UffdioWriteprotect(Message):
    start: U64
    len: U64
    on: bool


class ReadEvent(Message):
    """A read of the fd: waits for a page fault, and says its address and flags."""
