"""What a vCPU answers.

KVM_RUN carries what the guest executes: a list of instructions, each a list that begins with its name.
Kernel field names are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from protocol.kvm_run import MMIO_BYTES
from protocol.uapi.message import MAX_TRANSFER, U8, U32, U64, Ioctl

MAX_INSTRUCTIONS = 4096
MAX_RUN_BYTES = 3 << 20  # of all instructions of one KVM_RUN: what they read must fit in the reply
MAX_LOOP = 1 << 16


class KvmSetCpuid2(Ioctl):
    """Of CPUID only what matters here: leaf 0x80000008 EAX[7:0]."""

    maxphyaddr: Annotated[int, Field(ge=0, le=255)]


class KvmSetMsrs(Ioctl):
    """struct kvm_msrs with one entry; the reply is how many were set: 0 if there is no such register."""

    index: U32
    value: U64


def _fits(instruction: tuple[Any, ...]) -> tuple[Any, ...]:
    """name, gpa, size, values...: each value fits in `size` bytes."""
    _, _, size, *values = instruction
    if any(value >> 8 * size for value in values):
        raise ValueError(f"a value of more than {size} bytes")
    return instruction


Size = Annotated[int, Field(gt=0, le=MAX_TRANSFER)]
Data = Annotated[bytes, Field(min_length=1, max_length=MAX_TRANSFER)]
Word = Literal[1, 2, 4, 8]
Count = Annotated[int, Field(gt=0, le=MAX_LOOP)]


def _word(data: bytes) -> bytes:
    if len(data) not in (1, 2, 4, 8):
        raise ValueError("1, 2, 4 or 8 bytes")
    return data


# A list on the wire is a tuple here: not strict about that, but about what is in it.
_Lax = Field(strict=False)
_R = Annotated[tuple[Literal["r"], U64, Size], _Lax]
_W = Annotated[tuple[Literal["w"], U64, Data], _Lax]
_Cmpxchg = Annotated[tuple[Literal["cmpxchg"], U64, Word, U64, U64], _Lax, AfterValidator(_fits)]
_Xchg = Annotated[tuple[Literal["xchg"], U64, Annotated[bytes, AfterValidator(_word)]], _Lax]
_Add = Annotated[tuple[Literal["add"], U64, Word, U64], _Lax, AfterValidator(_fits)]
_Or = Annotated[tuple[Literal["or"], U64, Word, U64], _Lax, AfterValidator(_fits)]
_Movs = Annotated[tuple[Literal["movs"], U64, U64, Size], _Lax]
_Stos = Annotated[tuple[Literal["stos"], U64, U8, Size], _Lax]
_Exec = Annotated[tuple[Literal["exec"], U64], _Lax]
_Prefetch = Annotated[tuple[Literal["prefetch"], U64], _Lax]
_Wloop = Annotated[tuple[Literal["wloop"], U64, Count, U32, U64], _Lax]
_Rloop = Annotated[tuple[Literal["rloop"], U64, Count, U32], _Lax]
_SpinUntilZero = Annotated[tuple[Literal["spin_until_zero"], U64], _Lax]
_SpinUntilNe = Annotated[tuple[Literal["spin_until_ne"], U64, U64], _Lax]


def _name(instruction: Any) -> Any:
    if isinstance(instruction, (list, tuple)) and instruction and type(instruction[0]) is str:
        return instruction[0]
    return None


Instruction = Annotated[
    Annotated[_R, Tag("r")]
    | Annotated[_W, Tag("w")]
    | Annotated[_Cmpxchg, Tag("cmpxchg")]
    | Annotated[_Xchg, Tag("xchg")]
    | Annotated[_Add, Tag("add")]
    | Annotated[_Or, Tag("or")]
    | Annotated[_Movs, Tag("movs")]
    | Annotated[_Stos, Tag("stos")]
    | Annotated[_Exec, Tag("exec")]
    | Annotated[_Prefetch, Tag("prefetch")]
    | Annotated[_Wloop, Tag("wloop")]
    | Annotated[_Rloop, Tag("rloop")]
    | Annotated[_SpinUntilZero, Tag("spin_until_zero")]
    | Annotated[_SpinUntilNe, Tag("spin_until_ne")],
    Discriminator(_name),
]


class KvmRun(Ioctl):
    """Execute a program, in system-management mode if `smm`; None: go on with the last one.  `mmio_data` is
    what user space puts into kvm_run.mmio.data for the load the guest left for; what is missing is 0.  With
    `immediate_exit`, of struct kvm_run, the access user space was asked for is completed and the guest not
    run: EINTR.
    """

    program: Annotated[list[Instruction], Field(max_length=MAX_INSTRUCTIONS)] | None = None
    cpl: Literal[0, 3] = 3
    smm: bool = False
    mmio_data: Annotated[bytes, Field(max_length=MMIO_BYTES)] | None = None
    immediate_exit: U8 = 0


class KvmPreFaultMemory(Ioctl):
    """struct kvm_pre_fault_memory; reply: `gpa` and `size` of what is left."""

    gpa: U64
    size: U64
    flags: U64 = 0


class MmapDirtyRing(Ioctl):
    """mmap() of the vCPU at KVM_DIRTY_LOG_PAGE_OFFSET: the reply carries an fd whose bytes are the ring."""
