"""A vCPU as the recorder's guest drove it: batches of accesses, each run to its end or to where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from protocol.errors import UapiError, errno_name
from qemu_shim.vmm.vcpu import MmioExit, RunResult, Vcpu
from tests.conformance.kvm.step import CaseFailed, UnknownWord

Access = Sequence[Any]
Exit = dict[str, Any]

EXIT_NAMES = {
    0: "KVM_EXIT_UNKNOWN",
    1: "KVM_EXIT_EXCEPTION",
    2: "KVM_EXIT_IO",
    5: "KVM_EXIT_HLT",
    6: "KVM_EXIT_MMIO",
    8: "KVM_EXIT_SHUTDOWN",
    10: "KVM_EXIT_INTR",
    17: "KVM_EXIT_INTERNAL_ERROR",
    31: "KVM_EXIT_DIRTY_RING_FULL",
    39: "KVM_EXIT_MEMORY_FAULT",
}
MMIO_MAX = 100_000  # exits of one batch; the string instructions give one a byte


def _low(value: int, size: int) -> int:
    """As much of a value as goes into `size` bytes."""
    return value & ((1 << 8 * size) - 1)


def _bytes(value: int, size: int) -> bytes:
    return _low(value, size).to_bytes(size, "little")


# Accesses that are instructions as they are recorded, with their operands.
OPERANDS = {
    "r": ("gpa", "n"),
    "movs": ("dst", "src", "n"),
    "stos": ("gpa", "byte", "n"),
    "exec": ("gpa",),
    "prefetch": ("gpa",),
    "wloop": ("gpa", "count", "stride", "value"),
    "rloop": ("gpa", "count", "stride"),
    "spin_until_zero": ("gpa",),
    "spin_until_ne": ("gpa", "value"),
}
# And those that are not.
TRANSLATED: dict[str, Callable[..., Access]] = {
    "w": lambda gpa, n, value: ("w", gpa, _bytes(value, n)),
    "r16": lambda gpa: ("r", gpa, 16),
    "w16": lambda gpa, value: ("w", gpa, _bytes(value, 8) * 2),
    "cmpxchg": lambda gpa, n, expect, new: ("cmpxchg", gpa, n, _low(expect, n), _low(new, n)),
    "add": lambda gpa, n, value: ("add", gpa, n, _low(value, n)),
    "xchg": lambda gpa, n, value: ("xchg", gpa, _bytes(value, n)),
    "or0": lambda gpa: ("or", gpa, 1, 0),
}


def instruction(access: Access) -> Access:
    """What the vCPU executes for an access as recorded."""
    op, *operands = access or ("",)
    try:
        if op in TRANSLATED:
            return TRANSLATED[op](*operands)
    except TypeError:
        raise UnknownWord(f"access {list(access)}: not its operands") from None
    if op not in OPERANDS:
        raise UnknownWord(f"unknown access {list(access)}")
    if len(operands) != len(OPERANDS[op]):
        raise UnknownWord(f"access {list(access)}: not its operands {OPERANDS[op]}")
    return access


def values(batch: Sequence[Access], loads: Sequence[bytes]) -> list[int]:
    """What the loads of a whole batch gave, as recorded: a 16-byte one is two values."""
    sizes = [8 if access[0] == "r16" else access[2] for access in batch if access[0] in ("r", "r16")]
    if len(sizes) != len(loads):
        raise CaseFailed(f"{len(loads)} loads came back from a batch with {len(sizes)}")
    return [
        int.from_bytes(load[at : at + size], "little")
        for size, load in zip(sizes, loads, strict=True)
        for at in range(0, len(load), size)
    ]


class Cpu:
    """A vCPU and the batch it was given last."""

    def __init__(self, vcpu: Vcpu, cpl: int) -> None:
        self._vcpu = vcpu
        self._cpl = cpl
        self._batch: Sequence[Access] = ()
        self._loads: list[bytes] = []
        self.done = True

    @property
    def reads(self) -> list[int] | None:
        """Of the batch, null while it has not ended."""
        return values(self._batch, self._loads) if self.done else None

    async def run(
        self, batch: Sequence[Access] | None, replies: Sequence[str], immediate_exit: int = 0
    ) -> list[Exit]:
        """A batch, or the last one again (None): where it stopped if it did, from its start if it ended.

        Loads from MMIO are answered with `replies` in order, then with zeros.  Returns the exits.
        """
        if batch is not None or self.done:
            self._batch = self._batch if batch is None else batch
            program: list[Access] | None = [instruction(access) for access in self._batch]
        else:
            program = None
        exits: list[Exit] = []
        reply: bytes | None = None
        answers = iter(replies)
        while len(exits) <= MMIO_MAX:
            try:
                if program is not None:
                    run = await self._vcpu.run(program, cpl=self._cpl, immediate_exit=immediate_exit)
                else:
                    run = await self._vcpu.resume(reply, immediate_exit=immediate_exit)
            except UapiError as error:
                exits.append({"errno": errno_name(error.errno), "why": error.why})
                self.done = False
                return exits
            program = None
            self._loads = run.reads
            self.done = run.done
            if run.done:
                return exits
            exits.append(_as_recorded(run))
            if run.errno or run.mmio is None:
                return exits
            reply = None
            if not run.mmio.is_write:
                reply = bytes.fromhex(next(answers, "")).ljust(run.mmio.len, b"\0")[: run.mmio.len]
                exits[-1]["mmio"]["reply"] = reply.hex()
        raise CaseFailed(f"the batch does not end: {len(exits)} exits")


def _as_recorded(run: RunResult) -> Exit:
    made: Exit = {
        "errno": errno_name(run.errno) if run.errno else "0",
        "exit_reason": EXIT_NAMES.get(run.exit_reason, str(run.exit_reason)),
    }
    if run.mmio is not None:
        made["mmio"] = _mmio(run.mmio)
    if run.memory_fault is not None:
        made["memory_fault"] = dict(run.memory_fault)
    if run.internal is not None:
        made["internal"] = dict(run.internal)
    return made


def _mmio(mmio: MmioExit) -> dict[str, Any]:
    made: dict[str, Any] = {"phys_addr": mmio.phys_addr, "len": mmio.len, "is_write": int(mmio.is_write)}
    if mmio.is_write:
        made["data"] = mmio.data[: mmio.len].hex()
    return made
