"""Leaving the guest: why KVM_RUN returns, and how the guest's code goes on with the next one.

Models struct kvm_run [KVM kvm.h].  The guest's code is a coroutine; where it cannot go on by itself it
awaits an `Exit`, which ends KVM_RUN, and is resumed by the next one: with the bytes user space put into
`mmio.data` if it left for a load.  So "a failed access restarts" is a loop around the access, and what the
emulator still had to do is where it left it.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from protocol.flow import Wait
from protocol.kvm_run import ExitReason
from protocol.units import Gpa, Hva

# siginfo of the signal for a thread that consumed poisoned memory: SIGBUS, BUS_MCEERR_AR.
SIGBUS_ACTION_REQUIRED = {"signo": 7, "code": 4}


class Mmio(NamedTuple):
    """kvm_run.mmio: `data` is what a store writes, empty for a load."""

    phys_addr: Gpa
    len: int
    is_write: bool
    data: bytes


class MemoryFault(NamedTuple):
    """kvm_run.memory_fault: what the guest takes for private, or for shared, and is not."""

    flags: int
    gpa: Gpa
    size: int


@dataclass(frozen=True, slots=True)
class Exit:
    """One return of KVM_RUN, but for what the guest has done so far."""

    reason: ExitReason
    errno: int = 0
    why: str = ""
    mmio: Mmio | None = None
    memory_fault: MemoryFault | None = None
    suberror: int | None = None  # kvm_run.internal
    sigbus: Hva | None = None  # the thread consumed poisoned memory there

    def __await__(self) -> Generator[Exit, bytes, bytes]:
        return (yield self)


DONE = Exit(ExitReason.IO)
GuestCode = Coroutine[Any, Any, None]


class Resume:
    """Awaited by KVM_RUN's flow: go on with the guest's code until it leaves.  Its waits are the flow's."""

    def __init__(self, code: GuestCode, data: bytes | None) -> None:
        self._code = code
        self._data = data

    def __await__(self) -> Generator[Wait[Any], None, Exit]:
        answer = self._data
        while True:
            try:
                met = self._code.send(answer)
            except StopIteration:
                return DONE
            if isinstance(met, Exit):
                return met
            yield met
            answer = None
