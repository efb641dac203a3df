"""Files that somebody keeps open by number, to pin pages of by offset.

Models what memfd_pin_folios is given [mm gup.c]: a file in memory, all of whose range must be in it.  The
number is its keeper's alone, and ends with it.
"""

from __future__ import annotations

import errno
from itertools import count

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.page import Pte
from protocol.errors import UapiError
from protocol.units import Hva, size_of_level


class OpenFiles:
    def __init__(self) -> None:
        self._files: dict[int, MemoryFile] = {}
        self._numbers = count(1)

    def open(self, file: MemoryFile) -> int:
        """Its number; it is kept until `close`."""
        file.get()
        number = next(self._numbers)
        self._files[number] = file
        return number

    def close(self, number: int) -> None:
        """What is pinned stays pinned.  EINVAL: no such file."""
        self._get(number).put()
        del self._files[number]

    def close_all(self) -> None:
        for number in list(self._files):
            self.close(number)

    def page(self, number: int, at: int, end: int) -> Pte:
        """The page at `at`, made if need be; EINVAL if at..end is not all in the file: a pin is refused as a
        whole.  EBUSY: a guest's memory where the page is mapped is private; EHWPOISON; ENOMEM.
        """
        file = self._get(number)
        if end > file.size:
            raise UapiError(
                errno.EINVAL, f"pin of {file.name} up to {end:#x}: beyond its end, {file.size:#x} bytes"
            )
        index = at // size_of_level(file.level)
        for shown in file.mapped(index, index + 1):  # in whatever process
            shown.space.claims.check_mapping(shown.start, shown.end)
        return file.page_to_pin(at, Hva(at))

    def _get(self, number: int) -> MemoryFile:
        file = self._files.get(number)
        if file is None:
            raise UapiError(errno.EINVAL, f"there is no file {number} to pin pages of")
        return file
