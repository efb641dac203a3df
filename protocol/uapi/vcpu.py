"""What a vCPU answers.

KVM_RUN carries what the guest executes: its code is a list of accesses.  Kernel field names are
kept.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.uapi.message import MAX_TRANSFER, U64, Ioctl

MAX_ACCESSES = 4096
MAX_RUN_BYTES = 3 << 20  # of all accesses of one KVM_RUN: what they read must fit in the reply


class KvmSetCpuid2(Ioctl):
    """Of CPUID only what matters here: leaf 0x80000008 EAX[7:0]."""

    maxphyaddr: Annotated[int, Field(ge=0, le=255)]


ReadAccess = Annotated[tuple[U64, Annotated[int, Field(gt=0, le=MAX_TRANSFER)]], Field(strict=False)]
WriteAccess = Annotated[
    tuple[U64, Annotated[bytes, Field(min_length=1, max_length=MAX_TRANSFER)]], Field(strict=False)
]


class KvmRun(Ioctl):
    """Execute accesses: (gpa, size) reads, (gpa, bytes) writes."""

    accesses: Annotated[list[ReadAccess | WriteAccess], Field(max_length=MAX_ACCESSES)]


class KvmPreFaultMemory(Ioctl):
    """struct kvm_pre_fault_memory; reply: `gpa` and `size` of what is left."""

    gpa: U64
    size: U64
    flags: U64 = 0


class MmapDirtyRing(Ioctl):
    """mmap() of the vCPU at KVM_DIRTY_LOG_PAGE_OFFSET: the reply carries an fd whose bytes are the ring."""
