"""The first check of every ioctl: is the caller's struct as large as ours, and what lies beyond it?

Models iommufd_fops_ioctl with copy_struct_from_user [iommufd main.c], and VFIO's argsz [VFIO device_cdev.c].
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import UapiError
from protocol.rpc.channel import Fds
from protocol.rpc.service import Result
from protocol.uapi.iommufd import IommuStruct, VfioStruct

Obj = TypeVar("Obj")
S = TypeVar("S", bound=IommuStruct)
V = TypeVar("V", bound=VfioStruct)


def sized(run: Callable[[Obj, S, Fds], Result]) -> Callable[[Obj, S, Fds], Result]:
    """EINVAL: shorter than any version; EFAULT: not all there; E2BIG: it means something we do not know."""

    def checked(held: Obj, message: S, fds: Fds) -> Result:
        if message.size < message.MIN_SIZE:
            raise UapiError(errno.EINVAL, f"struct of {message.size} bytes: at least {message.MIN_SIZE}")
        beyond = message.size - message.SIZE
        if beyond > len(message.tail):
            raise UapiError(errno.EFAULT, f"struct of {message.size} bytes: not all of it can be read")
        if beyond > 0 and any(message.tail[:beyond]):
            raise UapiError(errno.E2BIG, f"struct of {message.size} bytes: not zero after {message.SIZE}")
        return run(held, message, fds)

    return checked


def argsz(run: Callable[[Obj, V, Fds], Result]) -> Callable[[Obj, V, Fds], Result]:
    """EINVAL: too short, or flags."""

    def checked(held: Obj, message: V, fds: Fds) -> Result:
        if message.argsz < message.MIN_SIZE:
            raise UapiError(errno.EINVAL, f"argsz {message.argsz}: at least {message.MIN_SIZE}")
        if message.flags:
            raise UapiError(errno.EINVAL, f"flags {message.flags:#x}: must be 0")
        return run(held, message, fds)

    return checked
