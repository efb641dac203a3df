"""A host process, as the VMM that is one sees it: its system calls on its own memory.

Thin names over the requests of `protocol/uapi/mm.py`; raises UapiError with the errno of the call.
"""

from __future__ import annotations

from typing import Literal

from protocol.units import PAGE_SIZE, align_up
from qemu_shim.vmm.file import File

Kind = Literal["anon", "anon_shared", "file_shared", "file_private"]


class MemFd(File):
    """A file in memory."""

    async def truncate(self, size: int) -> None:
        await self.ask("FTRUNCATE", size=size)

    async def punch_hole(self, offset: int, size: int) -> None:
        await self.ask("PUNCH_HOLE", offset=offset, size=size)

    async def pread(self, offset: int, n: int) -> bytes:
        data: bytes = (await self.ask("PREAD", offset=offset, size=n)).body["data"]
        return data

    async def pwrite(self, offset: int, data: bytes) -> None:
        await self.ask("PWRITE", offset=offset, data=data)


class Uffd(File):
    """A userfaultfd; `mode` is "missing", "wp" or "missing+wp"."""

    async def register(self, addr: int, size: int, mode: str) -> None:
        await self.ask("UFFDIO_REGISTER", start=addr, len=size, mode=mode)

    async def unregister(self, addr: int, size: int) -> None:
        await self.ask("UFFDIO_UNREGISTER", start=addr, len=size)

    async def copy(self, addr: int, data: bytes, wp: bool = False) -> None:
        """Fill whole pages with `data`, zeroes after it."""
        whole = data.ljust(align_up(len(data), PAGE_SIZE), b"\0")
        await self.ask("UFFDIO_COPY", dst=addr, data=whole, wp=wp)

    async def zeropage(self, addr: int, size: int) -> None:
        await self.ask("UFFDIO_ZEROPAGE", start=addr, len=size)

    async def writeprotect(self, addr: int, size: int, on: bool) -> None:
        await self.ask("UFFDIO_WRITEPROTECT", start=addr, len=size, on=on)

    async def next_event(self) -> tuple[int, list[str]]:
        """Wait for a page fault: its address, and "WRITE" and "WP" as they apply."""
        body = (await self.ask("READ_EVENT")).body
        return body["address"], body["flags"]


class Process(File):
    """The VMM's own address space."""

    async def mmap(
        self,
        size: int,
        *,
        addr: int | None = None,
        prot: str = "rw",
        kind: Kind = "anon",
        fixed: bool = False,
        offset: int = 0,
        file: MemFd | None = None,
        page_size: int = PAGE_SIZE,
    ) -> int:
        fds = [] if file is None else [file.dup()]
        reply = await self.ask(
            "MMAP",
            fds,
            addr=addr,
            size=size,
            prot=prot,
            kind=kind,
            fixed=fixed,
            offset=offset,
            page_size=page_size,
        )
        hva: int = reply.body["addr"]
        return hva

    async def munmap(self, addr: int, size: int) -> None:
        await self.ask("MUNMAP", addr=addr, size=size)

    async def mprotect(self, addr: int, size: int, prot: str) -> None:
        await self.ask("MPROTECT", addr=addr, size=size, prot=prot)

    async def mremap(self, addr: int, old_size: int, new_size: int, new_addr: int | None = None) -> int:
        reply = await self.ask("MREMAP", addr=addr, old_size=old_size, new_size=new_size, new_addr=new_addr)
        hva: int = reply.body["addr"]
        return hva

    async def madvise(self, addr: int, size: int, advice: str) -> None:
        await self.ask("MADVISE", addr=addr, size=size, advice=advice)

    async def madvise_dontneed(self, addr: int, size: int) -> None:
        await self.madvise(addr, size, "dontneed")

    async def move_pages(self, addr: int, size: int) -> int:
        moved: int = (await self.ask("MOVE_PAGES", addr=addr, size=size)).body["moved"]
        return moved

    async def host_action(self, action: str, addr: int, size: int) -> int:
        """What the host does to the range on its own; to how many pages it did."""
        pages: int = (await self.ask("HOST_ACTION", action=action, addr=addr, size=size)).body["pages"]
        return pages

    async def resident_pages(self, addr: int, size: int) -> int:
        """How many pages of 4 KiB are present in the range."""
        present: dict[str, int] = (await self.ask("PAGEMAP", addr=addr, size=size)).body["present"]
        return sum(count * int(page_size) for page_size, count in present.items()) // PAGE_SIZE

    async def anon_huge_kib(self, addr: int, size: int) -> int:
        kib: int = (await self.ask("PAGEMAP", addr=addr, size=size)).body["anon_huge_kib"]
        return kib

    async def read(self, addr: int, size: int) -> bytes:
        data: bytes = (await self.ask("READ", addr=addr, size=size)).body["data"]
        return data

    async def write(self, addr: int, data: bytes) -> None:
        await self.ask("WRITE", addr=addr, data=data)

    async def fork(self) -> Process:
        """The child; closing it is its exit."""
        return Process(self.loop, (await self.ask("FORK")).fds.take(0), "child")

    async def memfd(self, name: str, size: int = 0) -> MemFd:
        reply = await self.ask("MEMFD_CREATE", name=name, size=size)
        return MemFd(self.loop, reply.fds.take(0), name)

    async def userfaultfd(self, user_mode_only: bool = False) -> Uffd:
        reply = await self.ask("USERFAULTFD", user_mode_only=user_mode_only)
        return Uffd(self.loop, reply.fds.take(0), "userfaultfd")
