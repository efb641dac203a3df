"""The driver's own page of tables: one root with 512 absent entries, for a domain that maps nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any

from protocol.errors import UapiError
from protocol.hostmem import HIGH_RAM_START, WindowKind
from protocol.units import PAGE_SIZE, TIB, Hpa

# Above the largest host kvmd can be told to have, so that it lies in nobody's way.
EMPTY_ROOT = Hpa(HIGH_RAM_START + 32 * TIB)
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class EmptyTable:
    def __init__(self) -> None:
        self._fd = os.memfd_create("empty-root", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, PAGE_SIZE)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)

    def share(self) -> tuple[list[Any], list[int]]:
        """Its window, and the fds that go with it: of the window, and of the lease.  EMFILE."""
        fds: list[int] = []
        try:
            for _ in range(2):
                fds.append(os.dup(self._fd))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise UapiError(errno.EMFILE, "no room in our fd table") from None
        return [(WindowKind.TABLES, EMPTY_ROOT, PAGE_SIZE)], fds

    def close(self) -> None:
        os.close(self._fd)
