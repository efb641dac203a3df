"""copy_to_user and copy_from_user: what an ioctl reads and writes in the memory of its caller.

Models them as loads and stores that the kernel makes for the process [KVM kvm_main.c]: they may fault a page
in, they end with EFAULT where the process would get a signal, and what was copied before that stays copied.
"""

from __future__ import annotations

from kvmd.core.mm.mm import Mm
from protocol.units import Hva


async def copy_from_user(mm: Mm, address: Hva, size: int) -> bytes:
    """EFAULT."""
    return await mm.read(address, size, user=False) if size else b""


async def copy_to_user(mm: Mm, address: Hva, data: bytes) -> None:
    """EFAULT."""
    if data:
        await mm.write(address, data, user=False)
