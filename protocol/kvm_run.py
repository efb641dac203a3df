"""Why KVM_RUN returned: the numbers in struct kvm_run that kvmd writes and user space reads.

Models struct kvm_run [KVM kvm.h].  Apart from the messages, so that whoever only runs a vCPU does not load
what checks them.
"""

from __future__ import annotations

from enum import IntEnum

MMIO_BYTES = 8  # kvm_run.mmio.data
INTERNAL_ERROR_EMULATION = 1  # kvm_run.internal.suberror: the emulator cannot do it


class ExitReason(IntEnum):
    """kvm_run.exit_reason, KVM_EXIT_*.  The guest's code ends with an OUT, so that is IO."""

    UNKNOWN = 0
    IO = 2
    MMIO = 6
    INTR = 10
    INTERNAL_ERROR = 17
    DIRTY_RING_FULL = 31
    MEMORY_FAULT = 39
