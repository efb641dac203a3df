"""Host memory in this process: windows mapped from received fds, tables read-only, and the leases that go
with them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from device_sim.core.physmem import PhysicalMemory
from protocol.errors import UapiError
from protocol.hostmem import Window, WindowKind
from protocol.kernel.port import Kernel
from protocol.rpc.channel import Fds
from protocol.units import Hpa

_WRITABLE = (WindowKind.FRAMES, WindowKind.QUEUES)


@dataclass(slots=True)
class _Set:
    windows: list[Window]
    lease: int


class MappedMemory:
    """The sets of windows the driver gave us."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.physical = PhysicalMemory()
        self._sets: dict[int, _Set] = {}
        self._files: dict[tuple[WindowKind, int], tuple[int, int]] = {}  # what is mapped where, now or last
        self._next = 1

    def add(self, windows: list[tuple[str, int, int]], fds: Fds) -> int:
        """Map a set; its number.  EINVAL: a window or the number of fds is not right; ENOMEM."""
        if len(fds) != len(windows) + 1:
            raise UapiError(
                errno.EINVAL, f"{len(windows)} windows need {len(windows) + 1} fds, {len(fds)} came"
            )
        mapped: list[Window] = []
        try:
            for n, (kind, base, size) in enumerate(windows):
                mapped.append(self._map(kind, base, size, fds.peek(n)))
        except (OSError, ValueError) as error:
            for window in mapped:
                self.physical.drop(window)
            number = error.errno if isinstance(error, OSError) else None
            raise UapiError(number or errno.EINVAL, f"window {kind} {base:#x}+{size:#x}: {error}") from None
        number = self._next
        self._next += 1
        self._sets[number] = _Set(mapped, fds.take(len(windows)))
        return number

    def _map(self, kind: str, base: int, size: int, fd: int) -> Window:
        """Only frames and queues are mapped writable.  Raises OSError or ValueError."""
        known = WindowKind(kind)
        file = self._kernel.memory_of(fd)
        existing = self.physical.find(known, Hpa(base), size)
        if existing is not None:
            if self._files[known, base] != file:
                raise ValueError("another host's memory lies there")
            self.physical.share(existing)
            return existing
        mapping = self._kernel.map_peer(fd, size, writable=known in _WRITABLE)
        window = Window(known, Hpa(base), size, mapping.view)
        try:
            self.physical.add(window, mapping.close)
        except ValueError:
            mapping.close()
            raise
        self._files[known, base] = file
        return window

    def remove(self, number: int) -> None:
        """Unmap a set and end its lease.  ENOENT."""
        held = self._sets.pop(number, None)
        if held is None:
            raise UapiError(errno.ENOENT, f"memory set {number}: there is none")
        for window in held.windows:
            self.physical.drop(window)
        self._kernel.close_received(held.lease)

    def clear(self) -> None:
        for number in list(self._sets):
            self.remove(number)
