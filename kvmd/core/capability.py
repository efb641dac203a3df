"""What KVM and a VM say they can do, and what user space switches on.

Models KVM_CHECK_EXTENSION and KVM_ENABLE_CAP [KVM kvm_main.c], with the values of x86 in 6.18: a capability
that is unknown, or not modelled, is 0, and enabling it is EINVAL.  /dev/kvm speaks for what any VM can have.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import IntEnum

from kvmd.core.cpu.vcpus import MAX_VCPU_IDS, MAX_VCPUS
from kvmd.core.host import CpuFeatures
from kvmd.core.slots.dirty_log import MANUAL_INITIALLY_SET, MANUAL_PROTECT_ENABLE
from kvmd.core.slots.dirty_ring import DIRTY_GFN_BYTES, MAX_RING_BYTES
from kvmd.core.slots.guest_memfd import ATTRIBUTE_PRIVATE, MemfdFlag
from kvmd.core.slots.memslot import MAX_SLOTS
from kvmd.core.tables.root_policy import ALL_BEHAVIOURS, IOMMU_OWN, RootPolicy
from kvmd.core.vm import Kvm, VmType
from protocol.errors import UapiError
from protocol.units import PAGE_SIZE

ENABLE_CAP_ARGS = 4  # struct kvm_enable_cap


class KvmCap(IntEnum):
    """KVM_CAP_* [KVM kvm.h]."""

    USER_MEMORY = 3
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    JOIN_MEMORY_REGIONS_WORKS = 30
    INTERNAL_ERROR_DATA = 40
    MAX_VCPUS = 66
    READONLY_MEM = 81
    ENABLE_CAP_VM = 98
    CHECK_EXTENSION_VM = 105
    MULTI_ADDRESS_SPACE = 118
    MAX_VCPU_ID = 128
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244
    TDP_FD_OWN_ROOT = 1 << 16  # the model's
    TDP_FD_ROOT_POLICY = (1 << 16) + 1  # the model's


_PRESENT = (
    *(KvmCap.USER_MEMORY, KvmCap.USER_MEMORY2, KvmCap.EXT_CPUID, KvmCap.SYNC_MMU, KvmCap.READONLY_MEM),
    *(KvmCap.DESTROY_MEMORY_REGION_WORKS, KvmCap.JOIN_MEMORY_REGIONS_WORKS),
    *(KvmCap.ENABLE_CAP_VM, KvmCap.CHECK_EXTENSION_VM, KvmCap.IMMEDIATE_EXIT, KvmCap.INTERNAL_ERROR_DATA),
    *(KvmCap.MEMORY_FAULT_INFO, KvmCap.GUEST_MEMFD, KvmCap.PRE_FAULT_MEMORY, KvmCap.TDP_FD_OWN_ROOT),
)


def check_extension(features: CpuFeatures, vm: Kvm | None, cap: int) -> int:
    """KVM_CHECK_EXTENSION on `vm`, or on /dev/kvm."""
    values: dict[int, int] = {
        **dict.fromkeys(_PRESENT, 1),
        KvmCap.NR_MEMSLOTS: MAX_SLOTS,
        KvmCap.NR_VCPUS: min(features.cpus, MAX_VCPUS),  # no more than that are recommended
        KvmCap.MAX_VCPUS: MAX_VCPUS,
        KvmCap.MAX_VCPU_ID: MAX_VCPU_IDS,
        KvmCap.MULTI_ADDRESS_SPACE: _address_spaces(features, vm),
        KvmCap.MANUAL_DIRTY_LOG_PROTECT2: MANUAL_PROTECT_ENABLE | MANUAL_INITIALLY_SET,
        KvmCap.DIRTY_LOG_RING: MAX_RING_BYTES,
        KvmCap.DIRTY_LOG_RING_ACQ_REL: MAX_RING_BYTES,
        KvmCap.DIRTY_LOG_RING_WITH_BITMAP: int(features.dirty_ring_with_bitmap),
        KvmCap.TDP_FD_ROOT_POLICY: ALL_BEHAVIOURS,
        KvmCap.MEMORY_ATTRIBUTES: ATTRIBUTE_PRIVATE if vm is None or vm.private.attributes.supported else 0,
        KvmCap.VM_TYPES: sum(1 << kind for kind in VmType),
        KvmCap.GUEST_MEMFD_FLAGS: MemfdFlag.MMAP | MemfdFlag.INIT_SHARED
        if vm is None
        else vm.private.memfd_flags,
    }
    return int(values.get(cap, 0))


def _address_spaces(features: CpuFeatures, vm: Kvm | None) -> int:
    """A kernel built without SMM has not even the capability; with it, a VM can still be without."""
    if features.address_spaces == 1:
        return 0
    return features.address_spaces if vm is None else vm.slots.address_spaces


def enable_cap(vm: Kvm, cap: int, flags: int, args: Sequence[int]) -> None:
    """KVM_ENABLE_CAP on a VM; `args` that are left out are 0."""
    args = [*args, *[0] * (ENABLE_CAP_ARGS - len(args))]
    if cap == KvmCap.MANUAL_DIRTY_LOG_PROTECT2:
        _set_manual_protect(vm, flags, args[0])
    elif cap in (KvmCap.DIRTY_LOG_RING, KvmCap.DIRTY_LOG_RING_ACQ_REL):
        _set_ring_size(vm, args[0] & 0xFFFF_FFFF)  # the kernel takes a u32
    elif cap == KvmCap.DIRTY_LOG_RING_WITH_BITMAP:
        _set_ring_with_bitmap(vm, flags)
    elif cap == KvmCap.TDP_FD_OWN_ROOT:
        _set_lent_policy(vm, flags, args, IOMMU_OWN)
    elif cap == KvmCap.TDP_FD_ROOT_POLICY:
        _set_lent_policy(vm, flags, args[2:], RootPolicy.of(args[0], args[1]))
    else:
        raise UapiError(errno.EINVAL, f"capability {cap}: there is nothing to enable")


def _set_manual_protect(vm: Kvm, flags: int, options: int) -> None:
    allowed = MANUAL_PROTECT_ENABLE
    if options & MANUAL_PROTECT_ENABLE:
        allowed |= MANUAL_INITIALLY_SET
    if flags or options & ~allowed:
        raise UapiError(errno.EINVAL, f"manual protect {options:#x} flags {flags:#x}: {allowed:#x} and 0")
    vm.dirty_log.manual_protect = options


def _set_ring_size(vm: Kvm, size: int) -> None:
    log = vm.dirty_log
    least = max(log.ring_reserve * DIRTY_GFN_BYTES, PAGE_SIZE)
    if size < least or size & (size - 1):
        raise UapiError(errno.EINVAL, f"dirty ring of {size:#x} bytes: a power of two, at least {least:#x}")
    if size > MAX_RING_BYTES:
        raise UapiError(errno.E2BIG, f"dirty ring of {size:#x} bytes: at most {MAX_RING_BYTES:#x}")
    if log.ring_bytes or vm.vcpus:
        raise UapiError(errno.EINVAL, f"dirty rings are set once, before any of the {len(vm.vcpus)} vCPUs")
    log.ring_bytes = size


def _set_ring_with_bitmap(vm: Kvm, flags: int) -> None:
    """Every slot must have its bitmap, so there must be none yet."""
    rings, slots = vm.dirty_log.ring_bytes, len(vm.slots)
    if not vm.host.features.dirty_ring_with_bitmap or not rings or flags or slots:
        raise UapiError(
            errno.EINVAL, f"bitmaps beside rings of {rings:#x} bytes: {slots} slots, flags {flags:#x}"
        )
    vm.dirty_log.ring_with_bitmap = True


def _set_lent_policy(vm: Kvm, flags: int, rest: Sequence[int], policy: RootPolicy) -> None:
    """Which root is lent is settled with the first TDP FD; `rest`: arguments that say nothing."""
    if flags or any(rest) or vm.exports.tdps or vm.exports.made:
        what = f"flags {flags:#x}, further args {[hex(arg) for arg in rest]} (all 0)"
        raise UapiError(
            errno.EINVAL, f"a root of the IOMMU's own: {what}, {vm.exports.made} TDP FDs were made"
        )
    vm.mmu.lent_policy = policy
