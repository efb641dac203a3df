"""Paths and numbers of the uAPI that both ends say: all a client needs of it.

Apart from the messages, so that whoever only sends them does not load what checks them: that
is a good part of a client's start.
"""

from __future__ import annotations

from typing import Final

KVM_PATH: Final = "/dev/kvm"
KVM_API_VERSION: Final = 12

KVM_X86_SW_PROTECTED_VM: Final = 1  # the type of a VM with private memory
KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
KVM_CAP_DIRTY_LOG_RING: Final = 192
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: Final = 225
KVM_CAP_TDP_FD_OWN_ROOT: Final = 1 << 16  # the model's: what a TDP FD exports is a root of its own
# The model's: and does what arg 0 says, KVM_TDP_FD_ROOT_*; arg 1 is the level of its largest leaf, or 0.
KVM_CAP_TDP_FD_ROOT_POLICY: Final = (1 << 16) + 1
KVM_TDP_FD_ROOT_AGES: Final = 1
KVM_TDP_FD_ROOT_LOGS: Final = 2
KVM_TDP_FD_ROOT_TRACKS: Final = 4
KVM_TDP_FD_ROOT_NX_HUGE: Final = 8
KVM_TDP_FD_ROOT_TOLD_ALL: Final = 16
KVM_TDP_FD_ROOT_ZAPPED_WHOLE: Final = 32
KVM_TDP_FD_ROOT_FILLED_BESIDE: Final = 64
KVM_DIRTY_GFN_BYTES: Final = 16  # struct kvm_dirty_gfn {u32 flags, u32 slot, u64 offset}
KVM_DIRTY_GFN_F_DIRTY: Final = 1
KVM_DIRTY_GFN_F_RESET: Final = 2
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B56_4D00

IOMMU_PATH: Final = "/dev/iommu"
VFIO_PATH: Final = "/dev/vfio/devices/vfio"  # and the number of the device

IOMMU_IOAS_ON_DEMAND: Final = 1 << 0  # the model's: pages come when the device asks
IOMMU_IOAS_MAP_FIXED_IOVA: Final = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE: Final = 1 << 1
IOMMU_IOAS_MAP_READABLE: Final = 1 << 2

IOMMU_OPTION_RLIMIT_MODE: Final = 0  # 0: pins count in user->locked_vm; 1: in mm->locked_vm
IOMMU_OPTION_HUGE_PAGES: Final = 1  # of an IOAS; 0: 4 KiB leaves alone
IOMMU_OPTION_OP_SET: Final = 0
IOMMU_OPTION_OP_GET: Final = 1

IOMMU_HWPT_DATA_NONE: Final = 0
IOMMU_HWPT_DATA_KVM: Final = 3
IOMMU_HWPT_ALLOC_NEST_PARENT: Final = 1 << 0
IOMMU_HWPT_ALLOC_DIRTY_TRACKING: Final = 1 << 1
HWPT_ALLOC_SIZE: Final = 40  # struct iommu_hwpt_alloc
HWPT_ALLOC_MIN_SIZE: Final = 24
HWPT_KVM_INFO_SIZE: Final = 8  # struct iommu_hwpt_kvm_info
