"""Every integer of every request at its edges: an errno or a result, never a bug, and nobody else notices."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Tag

from kvmd.service.vcpu import VCPU
from protocol.rpc.service import Service
from protocol.uapi import vcpu as uapi
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.zoo import REQUESTS, SERVICES, SLOT_BYTES, SLOT_GPA, Zoo, zoo_of
from tests.kit.vmm import GUEST_START

EDGES = (
    *(0, 1, PAGE_SIZE - 1, PAGE_SIZE, SLOT_BYTES, SLOT_GPA + SLOT_BYTES - 1),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 46) - PAGE_SIZE, 1 << 46),
    *((1 << 47) - PAGE_SIZE, 1 << 47, 1 << 63, (1 << 64) - PAGE_SIZE, (1 << 64) - 1),
)
FINE = frozenset(
    {0, errno.EINVAL, errno.EFAULT, errno.ENOENT, errno.ENOMEM, errno.EEXIST, errno.EBUSY, errno.ENODEV}
    | {errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.E2BIG, errno.EFBIG, errno.ENXIO, errno.EAGAIN}
    | {errno.EOVERFLOW, errno.EBADF, errno.ENOSPC}
)
BUFFER = b"\xff" * 8


def integers(model: type[BaseModel]) -> Iterator[str]:
    """The fields that may hold one."""
    for name, says in model.model_json_schema()["properties"].items():
        if any(kind.get("type") == "integer" for kind in (says, *says.get("anyOf", ()))):
            yield name


def programs() -> Iterator[list[Any]]:
    """Each instruction with one of its integers at an edge."""
    usual: dict[str, list[Any]] = {
        "r": [SLOT_GPA, 8],
        "w": [SLOT_GPA, BUFFER],
        "cmpxchg": [SLOT_GPA, 8, 1, 2],
        "xchg": [SLOT_GPA, BUFFER],
        "add": [SLOT_GPA, 8, 1],
        "or": [SLOT_GPA, 8, 1],
        "movs": [SLOT_GPA, SLOT_GPA + 64, 64],
        "stos": [SLOT_GPA, 1, 64],
        "exec": [SLOT_GPA],
        "prefetch": [SLOT_GPA],
        "wloop": [SLOT_GPA, 4, PAGE_SIZE, 1],
        "rloop": [SLOT_GPA, 4, PAGE_SIZE],
        "spin_until_zero": [SLOT_GPA + SLOT_BYTES - 8],
        "spin_until_ne": [SLOT_GPA, 1 << 60],
    }
    assert set(usual) == _instructions()
    for name, operands in usual.items():
        for at, operand in enumerate(operands):
            if isinstance(operand, int) and not name.startswith("spin"):
                for edge in EDGES:
                    yield [name, *operands[:at], edge, *operands[at + 1 :]]


def _instructions() -> set[str]:
    tagged = get_args(get_args(uapi.Instruction)[0])
    return {part.tag for kind in tagged for part in get_args(kind) if isinstance(part, Tag)}


async def ask(zoo: Zoo, service: Service[Any], op: str, changed: dict[str, Any]) -> int:
    body, fds = REQUESTS[service.name, op](zoo)
    return await zoo.ask(service, op, {**body, **changed}, fds)


@pytest.mark.parametrize("service", [s for s in SERVICES if s.methods], ids=lambda s: s.name.strip("/"))
async def test_every_integer_of_every_request_at_its_edges(host: Host, service: Service[Any]) -> None:
    async with zoo_of(host) as zoo:
        for op, method in service.methods.items():
            for name in integers(method.model):
                for edge in EDGES:
                    answer = await ask(zoo, service, op, {name: edge})
                    assert answer in FINE, (op, name, hex(edge), answer)


async def test_every_operand_of_every_instruction_at_its_edges(host: Host) -> None:
    async with zoo_of(host) as zoo:
        for program in programs():
            for cpl in (0, 3):
                body = {"program": [program], "cpl": cpl}
                answer = await zoo.ask(VCPU, "KVM_RUN", body, [])
                assert answer in FINE, (program, answer)
        ran = await zoo.rig.vcpu.run([("r", GUEST_START, 4)])
        assert ran.reads == [b"here"]
