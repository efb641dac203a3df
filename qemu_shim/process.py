"""A host process, as the VMM that is one sees it: its system calls on its own memory.

Thin names over the requests of `protocol/uapi/mm.py`; raises UapiError with the errno of the call.
"""

from __future__ import annotations

from qemu_shim.file import File


class Process(File):
    """The VMM's own address space."""

    async def mmap(
        self, size: int, *, addr: int | None = None, prot: str = "rw", page_size: int = 4096
    ) -> int:
        reply = await self.ask("MMAP", addr=addr, size=size, prot=prot, page_size=page_size)
        hva: int = reply.body["addr"]
        return hva

    async def munmap(self, addr: int, size: int) -> None:
        await self.ask("MUNMAP", addr=addr, size=size)

    async def madvise_dontneed(self, addr: int, size: int) -> None:
        await self.ask("MADVISE", addr=addr, size=size, advice="dontneed")

    async def move_pages(self, addr: int, size: int) -> int:
        moved: int = (await self.ask("MOVE_PAGES", addr=addr, size=size)).body["moved"]
        return moved

    async def read(self, addr: int, size: int) -> bytes:
        data: bytes = (await self.ask("READ", addr=addr, size=size)).body["data"]
        return data

    async def write(self, addr: int, data: bytes) -> None:
        await self.ask("WRITE", addr=addr, data=data)
