"""The KVM HWPT: a TDP FD seen from IOMMUFD; it maps nothing and forwards everything.

Models struct iommufd_hwpt_kvm [RFC 13/42], [RFC 14/42], [RFC 15/42]: IO page faults go to KVM, KVM's
flushes go to the driver as invalidations.  It holds one reference on the TDP FD, so VM and root outlive
the user's own fds.

I9: an invalidation is acked to KVM only after the wait descriptor behind it completed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from iommufdd.core.hardware import MemoryBus
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.kvm_domain import KvmDomain
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, Gfn, Gpa, Iova, gfn_of, gpa_of_iova, iova_of_gpa

Invalidate = Callable[[Gpa, int, int], Coroutine[Any, Any, None]]  # start, size, epoch; its end is the ack


class Tdp(Protocol):
    """The ops of a TDP FD, as its importer calls them [RFC 01/42].  Each may raise UapiError."""

    async def fault(self, gfn: Gfn, *, read: bool, write: bool, exec: bool) -> None: ...
    async def pin(self, gfn: Gfn, npages: int) -> int: ...
    async def pin_all(self) -> int: ...
    async def unpin(self, pin: int) -> None: ...
    async def unregister(self) -> None: ...
    def release(self) -> None: ...


class HwptKvm(Hwpt):
    needs_iopf = True

    def __init__(self, domain: KvmDomain, memory: MemoryBus, tdp: Tdp) -> None:
        super().__init__(domain, memory)
        self.invalidations = 0
        self.acked_epoch = 0
        self._tdp = tdp

    async def fault_in(self, request: PageRequest) -> None:
        """Have KVM populate one page [RFC 15/42]."""
        gfn = gfn_of(gpa_of_iova(request.addr))
        await self._tdp.fault(gfn, read=request.read, write=request.write, exec=request.exec)

    async def invalidate(self, start: Gpa, size: int, epoch: int) -> None:
        """KVM flushed: drop every cached translation of the range, then return (the ack).

        Raises UapiError, which is no ack, if a unit refused.
        """
        self.invalidations += 1
        await self.forget(iova_of_gpa(start), size)
        self.acked_epoch = max(self.acked_epoch, epoch)

    async def pin(self, iova: Iova, size: int) -> int:
        """On-demand pinning is KVM's to do [RFC 00/42].  EINVAL: not whole pages of it; KVM's errnos."""
        if size <= 0 or (iova | size) & PAGE_OFFSET_MASK or (iova + size - 1) >> self.domain.width:
            raise UapiError(errno.EINVAL, f"pin of {iova:#x}+{size:#x}: not whole pages of the domain")
        return await self._tdp.pin(gfn_of(gpa_of_iova(iova)), size >> PAGE_SHIFT)

    async def pin_all(self) -> int:
        return await self._tdp.pin_all()

    async def unpin(self, pin: int) -> None:
        await self._tdp.unpin(pin)

    async def destroy(self) -> None:
        """The units let go of the memory, then unregister, then put: while anything could walk we hear of
        flushes, and nothing is told of a domain that is gone (defect B-10).
        """
        await super().destroy()
        with suppress(UapiError):  # KVM is gone
            await self._tdp.unregister()
        self._tdp.release()
