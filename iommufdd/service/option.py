"""IOMMU_OPTION: whose RLIMIT_MEMLOCK pins count against, and large IO pages [iommufd main.c, ioas.c].

Departure: whoever has an iommufd may choose how its pins count, as with CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from iommufdd.core.ioas import Ioas
from iommufdd.service.objects import IommuFile
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.uapi import iommufd as uapi
from protocol.uapi import names

RLIMIT_MODES = ("user", "mm")  # by val64


async def option(held: IommuFile, message: uapi.IommuOption, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    known = _OPTIONS.get(message.option_id)
    if known is None:
        raise UapiError(errno.EOPNOTSUPP, f"option {message.option_id}: there are {sorted(_OPTIONS)}")
    return {"val64": await known(held, message)}


async def _rlimit_mode(held: IommuFile, message: uapi.IommuOption) -> int:
    if message.object_id:
        raise UapiError(
            errno.EOPNOTSUPP,
            f"RLIMIT_MODE of object {message.object_id}: it is the iommufd's, object_id is 0",
        )
    if message.option_op == names.IOMMU_OPTION_OP_GET:
        return RLIMIT_MODES.index(held.ctx.connector.account)
    _check_set(message)
    if any(held.ctx.objects):
        raise UapiError(errno.EBUSY, "RLIMIT_MODE is chosen before the iommufd has any object")
    _check_flag(message)
    held.ctx.connector.account = RLIMIT_MODES[message.val64]
    return message.val64


async def _huge_pages(held: IommuFile, message: uapi.IommuOption) -> int:
    ioas = held.ctx.objects.get(message.object_id, Ioas)
    if message.option_op == names.IOMMU_OPTION_OP_GET:
        return int(ioas.large_pages)
    _check_set(message)
    _check_flag(message)
    with ioas.used():
        await ioas.set_large_pages(on=bool(message.val64))
    return message.val64


def _check_set(message: uapi.IommuOption) -> None:
    if message.option_op != names.IOMMU_OPTION_OP_SET:
        raise UapiError(errno.EOPNOTSUPP, f"op {message.option_op}: there are SET (0) and GET (1)")


def _check_flag(message: uapi.IommuOption) -> None:
    if message.val64 not in (0, 1):
        raise UapiError(errno.EINVAL, f"option {message.option_id} set to {message.val64}: it is 0 or 1")


_OPTIONS: dict[int, Callable[[IommuFile, uapi.IommuOption], Awaitable[int]]] = {
    names.IOMMU_OPTION_RLIMIT_MODE: _rlimit_mode,
    names.IOMMU_OPTION_HUGE_PAGES: _huge_pages,
}
