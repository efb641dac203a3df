"""What kvmd answers at its front door, for /dev/kvm and for VMs.

One model per request, kernel field names kept.  The front door stands for the host itself: processes
come to life there (MM_CREATE) and open /dev/kvm.  File descriptors travel beside the message; where one
is expected the docstring says so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.uapi.message import U32, U64, Message


class Open(Message):
    """Open a device node by path; the reply carries its fd."""

    path: Annotated[str, Field(max_length=256)]


class MmCreate(Message):
    """A process starts: the reply carries the fd of its address space; closing the last copy is its exit."""


class Stats(Message):
    """Counters of everything the daemon keeps, for people and scenarios."""


class Check(Message):
    """Run every invariant check now; the reply lists what does not hold."""


class KvmGetApiVersion(Message):
    pass


class KvmCreateVm(Message):
    """With the fd of the creating process's mm; the reply carries the VM fd."""

    type: U64 = 0


class KvmCreateVcpu(Message):
    """The reply carries the vCPU fd."""

    vcpu_id: U32


class KvmSetUserMemoryRegion(Message):
    """struct kvm_userspace_memory_region."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


class KvmCreateTdpFd(Message):
    """struct kvm_create_tdp_fd without its result: the reply carries the TDP FD [RFC 03/42].

    `argp` is where the struct lies in the caller's memory: it must be there, to be read and to be written.
    """

    as_id: U32
    mode: U32 = 0
    pad: U32 = 0
    argp: U64 | None = None


class KvmRegisterNoncoherentDma(Message):
    """What the KVM-VFIO device does for a device whose DMA does not snoop [KVM vfio.c]."""


class KvmUnregisterNoncoherentDma(Message):
    """Its counterpart; EINVAL: none is registered."""
