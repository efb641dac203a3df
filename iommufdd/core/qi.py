"""From a range of guest memory to invalidation descriptors, in the order that is safe.

Models cache_invalidate_kvm of the series [RFC 22/42] on the queued invalidation interface [VT-d 6.5]:
the IOTLB first, by domain id, then every attached function's device TLB, then a wait.  A device may ask
again the moment its entry is dropped; with the IOTLB still holding the old leaf it would be given that,
for good (I9, R7).

The hint IH stays 0: KVM's notification does not say whether a table was cut off, so paging-structure
caches go as well (R6, defect B-21).  A range that is not whole pages is rounded outwards (B-29), one too
large for a descriptor becomes the whole domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from protocol.hw.caps import Cap, Ecap
from protocol.hw.qi import (
    DEVTLB_ALL,
    ContextGranularity,
    ContextInv,
    Descriptor,
    DevTlbInv,
    IotlbGranularity,
    IotlbInv,
    PageGroupResponse,
    PasidCacheGranularity,
    PasidCacheInv,
    ResponseCode,
    WaitDescriptor,
    devtlb_addr,
    encode,
    psi_cover,
)
from protocol.trace import TRACE, QiSubmit
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, WHOLE_SIZE, Iova, Pasid

QI_DONE = 2  # status data of a completed wait, as Linux writes it


def invalidate(cap: Cap, did: int, rids: Iterable[int], start: Iova, size: int) -> list[Descriptor]:
    """Drop iova range start..start+size of domain `did`; start 0 and all ones is everything."""
    first = start >> PAGE_SHIFT
    npages = (size + (start & PAGE_OFFSET_MASK) + PAGE_OFFSET_MASK) >> PAGE_SHIFT
    whole = size == WHOLE_SIZE or first + npages > 1 << (64 - PAGE_SHIFT)
    if not whole:
        addr, am = psi_cover(first, max(npages, 1))
        whole = not cap.psi or am > cap.mamv
    if whole:
        iotlb = IotlbInv(granularity=IotlbGranularity.DOMAIN, did=did, dw=True, dr=True)
        return [iotlb, *(everything(rid) for rid in rids), wait()]
    iotlb = IotlbInv(granularity=IotlbGranularity.PAGE, did=did, am=am, addr=addr, dw=True, dr=True)
    device_addr, sized = devtlb_addr(addr >> PAGE_SHIFT, 1 << am)
    return [iotlb, *(DevTlbInv(sid=rid, size=sized, addr=device_addr) for rid in rids), wait()]


def detach(did: int, rid: int, ecap: Ecap, *, ats: bool = True) -> list[Descriptor]:
    """After a function's PASID entry was cleared: nothing may remember it [VT-d 6.5.2].  `ats`: it has a
    device TLB, and completes what is to go from that.
    """
    return [
        PasidCacheInv(granularity=PasidCacheGranularity.PASID, did=did, pasid=Pasid(0)),
        IotlbInv(granularity=IotlbGranularity.DOMAIN, did=did, dw=True, dr=True),
        *_device(rid, ecap, ats=ats),
        wait(),
    ]


def drain(did: int, rid: int, ecap: Ecap, *, ats: bool = True) -> list[Descriptor]:
    """After a function's page requests were switched off: software has seen all it sent [VT-d 7.10]."""
    return [
        WaitDescriptor(fn=True),
        IotlbInv(granularity=IotlbGranularity.DOMAIN, did=did, dw=True, dr=True),
        *_device(rid, ecap, ats=ats),
        WaitDescriptor(sw=True, fn=True, pd=bool(ecap.pds), status_data=QI_DONE),
    ]


def forget_all() -> list[Descriptor]:
    """After a root table was set, by a unit that keeps what it had cached until it is told [VT-d 6.5.2]."""
    return [
        ContextInv(granularity=ContextGranularity.GLOBAL),
        PasidCacheInv(granularity=PasidCacheGranularity.GLOBAL),
        IotlbInv(granularity=IotlbGranularity.GLOBAL, dw=True, dr=True),
        wait(),
    ]


def forget_function(rid: int) -> list[Descriptor]:
    """After a function's context entry was made absent [Linux intel/pasid.c intel_context_flush_no_pasid].
    Its device TLB is not asked: it goes because it does not answer.
    """
    return [
        ContextInv(granularity=ContextGranularity.DEVICE, sid=rid),
        PasidCacheInv(granularity=PasidCacheGranularity.GLOBAL),
        IotlbInv(granularity=IotlbGranularity.GLOBAL, dw=True, dr=True),
        wait(),
    ]


def _device(rid: int, ecap: Ecap, *, ats: bool) -> list[Descriptor]:
    return [everything(rid)] if ecap.dt and ats else []


def everything(rid: int) -> DevTlbInv:
    return DevTlbInv(sid=rid, size=True, addr=DEVTLB_ALL)


def wait() -> WaitDescriptor:
    """Completes when all before it has; the queue says where and what it stores, `inval_queue.py`."""
    return WaitDescriptor(sw=True, fn=True, status_data=QI_DONE)


def page_group_response(
    rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None
) -> PageGroupResponse:
    """With the PASID if the request had one: without it a function may take it for nobody's [PCIe 10.4],
    [Linux intel/prq.c handle_bad_prq_event].
    """
    if pasid is None:
        return PageGroupResponse(rid=rid, prgi=prgi, code=code)
    return PageGroupResponse(rid=rid, prgi=prgi, code=code, pasid_present=True, pasid=pasid)


def kind_of(descriptor: Descriptor) -> str:
    """What STATS counts it as."""
    if isinstance(descriptor, IotlbInv):
        return f"iotlb_{descriptor.granularity.name.lower()}"
    return _KINDS[type(descriptor)]


_KINDS: dict[type[Descriptor], str] = {
    ContextInv: "context",
    DevTlbInv: "devtlb",
    PasidCacheInv: "pasid_cache",
    WaitDescriptor: "wait",
    PageGroupResponse: "page_group_response",
}


def raw(descriptors: Sequence[Descriptor]) -> list[bytes]:
    """As they lie in the ring, traced."""
    encoded = [encode(descriptor) for descriptor in descriptors]
    if TRACE.on:
        for descriptor, words in zip(descriptors, encoded, strict=True):
            if not isinstance(descriptor, WaitDescriptor):
                TRACE.emit(QiSubmit.of(words))
    return encoded
