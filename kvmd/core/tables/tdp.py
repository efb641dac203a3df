"""The TDP of one VM: its tables, the flushes of it, and long work on it, side by side for whoever changes it.

Models the part of struct kvm that the MMU keeps [KVM kvm_host.h].  Attributes alone: each says for itself
what may be done with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import TdpMmu
from kvmd.core.tables.zap import Zapper


@dataclass(slots=True, eq=False)
class VmTdp:
    mmu: TdpMmu
    flusher: Flusher
    zapper: Zapper
