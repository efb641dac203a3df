"""A table of fds: numbers of open files, given as Linux gives them, the lowest that is free."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from simulator.kernel.files import OpenFile, oserror

FD_LIMIT = 1024


class FdTable:
    """Of the process `name`."""

    def __init__(self, name: str, fd_limit: int = FD_LIMIT) -> None:
        self.name = name
        self.fd_limit = fd_limit
        self._files: dict[int, OpenFile] = {}
        self._free = 3  # no fd below is

    def install(self, file: OpenFile) -> int:
        """A new fd for it.  EMFILE."""
        fd = self._free
        while fd in self._files:
            fd += 1
        if fd >= self.fd_limit:
            raise oserror(errno.EMFILE)
        self._files[fd] = file.get()
        self._free = fd + 1
        return fd

    def install_first(self, files: Iterable[OpenFile]) -> list[int]:
        """None behind the first that finds no place [Linux net/core/scm.c scm_detach_fds]."""
        fds: list[int] = []
        for file in files:
            try:
                fds.append(self.install(file))
            except OSError:
                break
        return fds

    def take_out(self, fd: int) -> OpenFile:
        """The fd is free again, and its use of the file the caller's.  EBADF."""
        file = self.file(fd)
        del self._files[fd]
        self._free = min(self._free, fd)
        return file

    def put_in(self, fd: int, file: OpenFile) -> OpenFile:
        """The fd is that file's, and its use of what was there the caller's.  EBADF."""
        before = self.file(fd)
        self._files[fd] = file.get()
        return before

    def file(self, fd: int) -> OpenFile:
        """EBADF."""
        found = self._files.get(fd)
        if found is None:
            raise oserror(errno.EBADF)
        return found

    def find(self, fd: int) -> OpenFile | None:
        return self._files.get(fd)

    def open_files(self) -> dict[int, OpenFile]:
        """But for our ends of leases, which end with those who have the others."""
        return {fd: file for fd, file in sorted(self._files.items()) if not file.is_lent}

    @property
    def fds(self) -> int:
        """How many are open."""
        return len(self._files)
