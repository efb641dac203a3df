"""What kvmd answers at its front door, for /dev/kvm and for VMs.

One model per request, kernel field names kept.  The front door stands for the host itself: processes
come to life there (MM_CREATE) and open /dev/kvm.  File descriptors travel beside the message; where one
is expected the docstring says so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.uapi.message import U32, U64, Ioctl, Message


class Open(Message):
    """Open a device node by path; the reply carries its fd."""

    path: Annotated[str, Field(max_length=256)]


class MmCreate(Message):
    """A process starts: the reply carries the fd of its address space; closing the last copy is its exit."""


MAX_VMS_TOLD = 7  # of one STATS, by their fds


class Stats(Message):
    """Counters of the host, and of the VMs whose fds are sent along; `vm_count` VMs there are."""


class StatsOfAll(Message):
    """The same at the administrator's door: of the first MAX_TOLD VMs whose numbers are above `after`."""

    after: U32 = 0


class Check(Message):
    """Run every invariant check now; the reply lists what does not hold."""


class KvmGetApiVersion(Message):
    pass


class KvmCreateVm(Message):
    """With the fd of the creating process's mm; the reply carries the VM fd."""

    type: U64 = 0


class KvmCreateVcpu(Ioctl):
    """The reply carries the vCPU fd."""

    vcpu_id: U32


class KvmSetUserMemoryRegion(Ioctl):
    """struct kvm_userspace_memory_region."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


class KvmSetUserMemoryRegion2(KvmSetUserMemoryRegion):
    """struct kvm_userspace_memory_region2; the first fd is that of `guest_memfd`, if the number is open."""

    guest_memfd_offset: U64 = 0
    guest_memfd: U32 = 0
    pad1: U32 = 0
    pad2: U64 = 0  # each of its 14 words


class KvmCheckExtension(Ioctl):
    """Reply: `ret`."""

    cap: U64


class KvmEnableCap(Ioctl):
    """struct kvm_enable_cap; what is left out of `args` is 0."""

    cap: U32
    flags: U32 = 0
    args: Annotated[list[U64], Field(max_length=4)]


class KvmGetDirtyLog(Ioctl):
    """struct kvm_dirty_log: the bits go to the caller's memory at `dirty_bitmap`."""

    slot: U32
    dirty_bitmap: U64


class KvmClearDirtyLog(Ioctl):
    """struct kvm_clear_dirty_log: the bits to clear lie in the caller's memory at `dirty_bitmap`."""

    slot: U32
    num_pages: U32
    first_page: U64
    dirty_bitmap: U64


class KvmResetDirtyRings(Ioctl):
    """Reply: `ret`, how many entries were taken back."""


class KvmCreateGuestMemfd(Ioctl):
    """struct kvm_create_guest_memfd; the reply carries the fd."""

    size: U64
    flags: U64 = 0
    reserved: U64 = 0  # each of its 6 words


class KvmSetMemoryAttributes(Ioctl):
    """struct kvm_memory_attributes."""

    address: U64
    size: U64
    attributes: U64
    flags: U64 = 0


class KvmCreateTdpFd(Ioctl):
    """struct kvm_create_tdp_fd without its result: the reply carries the TDP FD [RFC 03/42].

    The struct at `argp` must be there to be written, too.
    """

    as_id: U32
    mode: U32 = 0
    pad: U32 = 0


class KvmRegisterNoncoherentDma(Ioctl):
    """What the KVM-VFIO device does for a device whose DMA does not snoop [KVM vfio.c]."""


class KvmUnregisterNoncoherentDma(Ioctl):
    """Its counterpart; EINVAL: none is registered."""


class PageTrackAdd(Ioctl):
    """No ioctl: what a user of kvm_page_track in the kernel does.  Stores to that page are emulated."""

    gpa: U64


class PageTrackRemove(Ioctl):
    gpa: U64


class NxHugePages(Ioctl):
    """No ioctl: the module parameter nx_huge_pages, for this VM.  On: no huge leaf is executable."""

    on: bool


class RecoverNxHugePages(Ioctl):
    """No ioctl: what KVM's recovery thread does now and then.  Reply: `ret`, how many tables went."""


class ZapGfnRange(Ioctl):
    """No ioctl: kvm_zap_gfn_range, for whoever changes what a range is: MTRRs, the APIC's page."""

    gpa: U64
    size: U64


class KvmFaultNotesGet(Message):
    """The model's, at kvmd's doors, with a VM fd (EINVAL if it is something else): the reply carries a
    channel over which kvmd says what the VM's vCPUs faulted in.  It is no reference on the VM.
    """


class KvmFaultedIn(Message):
    """kvmd to whoever has such a channel: fire and forget, sent once the entry is stored."""

    gfn: U64
    npages: Annotated[int, Field(ge=1, le=1 << 18)]
    writable: bool
