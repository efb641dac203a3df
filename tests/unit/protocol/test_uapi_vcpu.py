"""Guest programs on the wire: only what is an instruction, with operands that fit, gets through."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from protocol.uapi.vcpu import MAX_INSTRUCTIONS, MAX_LOOP, KvmRun

TOP = (1 << 64) - 1
GOOD: list[list[Any]] = [
    ["r", TOP, 1],
    ["w", 0, b"x"],
    ["cmpxchg", 0, 8, TOP, 0],
    ["xchg", 0, b"1234"],
    ["add", 0, 1, 255],
    ["or", 0, 2, 0],
    ["movs", 0, TOP, 1 << 20],
    ["stos", 0, 255, 1],
    ["exec", 0],
    ["prefetch", TOP],
    ["wloop", 0, MAX_LOOP, 0, TOP],
    ["rloop", 0, 1, (1 << 32) - 1],
    ["spin_until_zero", 0],
    ["spin_until_ne", 0, TOP],
]


def run(program: Any, **fields: Any) -> KvmRun:
    return KvmRun.model_validate({"op": "KVM_RUN", "program": program, **fields})


def test_every_instruction_is_a_tuple_of_itself() -> None:
    assert run(GOOD).program == [tuple(instruction) for instruction in GOOD]


@pytest.mark.parametrize(
    "instruction",
    [
        [],
        None,
        "r",
        {"r": 0},
        [0, 1],
        [["r"], 0, 1],
        ["halt"],
        ["r", 0],
        ["r", 0, 1, 2],
        ["r", -1, 1],
        ["r", TOP + 1, 1],
        ["r", 0, 0],
        ["r", 0, (1 << 20) + 1],
        ["r", 0, True],
        ["r", 0, 1.0],
        ["r", "0", 1],
        ["w", 0, b""],
        ["w", 0, "text"],
        ["w", 0, bytes((1 << 20) + 1)],
        ["cmpxchg", 0, 3, 0, 0],
        ["cmpxchg", 0, 16, 0, 0],
        ["cmpxchg", 0, 1, 256, 0],
        ["cmpxchg", 0, 4, 0, 1 << 32],
        ["xchg", 0, b"123"],
        ["add", 0, 4, 1 << 32],
        ["or", 0, 1, -1],
        ["movs", 0, 0, 0],
        ["stos", 0, 256, 1],
        ["exec", TOP + 1],
        ["wloop", 0, 0, 0, 0],
        ["wloop", 0, MAX_LOOP + 1, 0, 0],
        ["rloop", 0, 1, 1 << 32],
        ["spin_until_ne", 0],
    ],
    ids=lambda instruction: repr(instruction)[:30],
)
def test_what_is_no_instruction_is_refused(instruction: Any) -> None:
    with pytest.raises(ValidationError):
        run([instruction])


def test_a_program_has_an_end() -> None:
    run([["exec", 0]] * MAX_INSTRUCTIONS)
    with pytest.raises(ValidationError):
        run([["exec", 0]] * (MAX_INSTRUCTIONS + 1))


@pytest.mark.parametrize(
    "fields", [{"cpl": 1}, {"cpl": -1}, {"smm": 1}, {"mmio_data": bytes(9)}, {"mmio_data": "x"}, {"more": 0}]
)
def test_privilege_mode_and_data_are_what_kvm_run_knows(fields: dict[str, Any]) -> None:
    run(None, cpl=0, smm=True, mmio_data=bytes(8))
    with pytest.raises(ValidationError):
        run(None, **fields)
