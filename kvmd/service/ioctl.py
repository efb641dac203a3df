"""The gate every ioctl of a VM and of a vCPU goes through before it is looked at.

EIO for a caller whose mm is not the VM's, before anything else; EFAULT for a struct that is not there, before
anything of it is believed [KVM kvm_main.c].  The fields travel in the message; `argp`, where given, says
where in the caller's memory the struct lies.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Protocol, TypeVar

from kvmd.core.mm.uaccess import copy_from_user, copy_to_user
from kvmd.service.objects import MmFile, VmFile
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Result
from protocol.uapi.message import Ioctl
from protocol.units import Hva


class Owned(Protocol):
    """An object that belongs to a VM."""

    @property
    def vm_file(self) -> VmFile: ...


Obj = TypeVar("Obj", bound=Owned)
M = TypeVar("M", bound=Ioctl)


def ioctl(
    model: type[M],
    run: Callable[[Obj, M, Fds], Result],
    struct_bytes: int = 0,
    *,
    returns: bool = False,
    fds: Callable[[M], bool] | None = None,
    exists: Callable[[Obj], bool] = lambda obj: True,
) -> Method[Obj, M]:
    """`run` behind the gate.  `struct_bytes`: what the argument points to, 0 if it is a value; `returns`: the
    kernel stores a result there, so it must be writable too; `fds`: whether the request itself brings one;
    `exists`: whether this object has the request at all.  ENOTTY if not, whatever the argument is.
    """

    def gated(obj: Obj, message: M, sent: Fds) -> Result:
        if message.other_mm:
            _check_caller(obj.vm_file, sent)
        if not exists(obj):
            raise UapiError(errno.ENOTTY, f"VM {obj.vm_file.vm.id} does not know {message.op}")
        if message.argp is None or not struct_bytes:
            return run(obj, message, sent)
        return obj.vm_file.users.holding(checked(obj, message, sent, Hva(message.argp)))

    async def checked(obj: Obj, message: M, sent: Fds, argp: Hva) -> Body | Answer:
        mm = obj.vm_file.vm.mm
        struct = await copy_from_user(mm, argp, struct_bytes)
        if returns:
            await copy_to_user(mm, argp, struct)
        result = run(obj, message, sent)
        return await _flow(result) if isinstance(result, CoroutineType) else result  # type: ignore[return-value]

    def takes(message: M) -> int:
        return (fds is not None and fds(message)) + message.other_mm

    return Method(model, gated, 1 if fds is None else 2, takes)


async def _flow(result: Coroutine[Any, None, Body | Answer]) -> Body | Answer:
    return await result


def _check_caller(owner: VmFile, sent: Fds) -> None:
    """The last fd is the mm of the calling process [KVM kvm_vm_ioctl]."""
    caller = owner.app.files.find(sent.peek(len(sent) - 1), MmFile)
    if caller.mm is not owner.vm.mm:
        raise UapiError(
            errno.EIO, f"the caller is process {caller.mm.id}, the VM is process {owner.vm.mm.id}'s"
        )
