"""What kvmd answers: the front door, /dev/kvm, VMs, vCPUs and process address spaces.

One model per request, kernel field names kept.  The front door stands for the host itself: processes
come to life there (MM_CREATE) and open /dev/kvm.  File descriptors travel beside the message; where one
is expected the docstring says so.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi.message import U32, U64, Message

MAX_ACCESSES = 4096
MAX_TRANSFER = 1 << 20
MAX_RUN_BYTES = 3 << 20  # of all accesses of one KVM_RUN: what they read must fit in the reply


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
    """struct kvm_create_tdp_fd without its result: the reply carries the TDP FD [RFC 03/42]."""

    as_id: U32
    mode: U32 = 0
    pad: U32 = 0


class KvmSetCpuid2(Message):
    """Of CPUID only what matters here: leaf 0x80000008 EAX[7:0]."""

    maxphyaddr: Annotated[int, Field(ge=0, le=255)]


ReadAccess = Annotated[tuple[U64, Annotated[int, Field(gt=0, le=MAX_TRANSFER)]], Field(strict=False)]
WriteAccess = Annotated[
    tuple[U64, Annotated[bytes, Field(min_length=1, max_length=MAX_TRANSFER)]], Field(strict=False)
]


class KvmRun(Message):
    """Execute accesses: (gpa, size) reads, (gpa, bytes) writes."""

    accesses: Annotated[list[ReadAccess | WriteAccess], Field(max_length=MAX_ACCESSES)]


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
