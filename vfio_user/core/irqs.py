"""The client's eventfds, one an interrupt, and what SET_IRQS does to them
[vfio-user VFIO_USER_DEVICE_SET_IRQS].

QEMU sends the fds of a range in several messages, each with as many as were negotiated, and a message without
any takes those of its range away; so does a message for the numbers it has too few fds for.  No interrupt
here can be masked by a message: MSI-X has its table for that, and INTx does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL, ENOTTY

from protocol.errors import UapiError
from vfio_user.core.function import IrqEvent, PciFunction
from vfio_user.core.records import IrqSet, IrqSetFlags


class Irqs:
    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self._events: list[list[IrqEvent | None]] = [[None] * count for count in function.irqs]

    def count(self, index: int) -> int:
        if index >= len(self._events):
            raise UapiError(EINVAL, f"interrupt index {index}: there are {len(self._events)}")
        return len(self._events[index])

    def check(self, asked: IrqSet, fds: int) -> None:
        """UapiError: nothing is changed by it."""
        count = self.count(asked.index)
        what = f"interrupts {asked.start}+{asked.count} of index {asked.index}"
        if fds > (asked.count if asked.data is IrqSetFlags.DATA_EVENTFD else 0):
            raise UapiError(EINVAL, f"{what}: {fds} fds came")
        if asked.disables_all:
            return
        if not asked.count or asked.start + asked.count > count:
            raise UapiError(EINVAL, f"{what}: it has {count}")
        if asked.action is not IrqSetFlags.ACTION_TRIGGER:
            raise UapiError(ENOTTY, f"{what} cannot be masked")

    def perform(self, asked: IrqSet, events: Sequence[IrqEvent]) -> None:
        """What was checked.  The events are ours from here on."""
        if asked.disables_all:
            self._set(asked.index, 0, [None] * self.count(asked.index))
        elif asked.data is IrqSetFlags.DATA_EVENTFD:
            missing = [None] * (asked.count - len(events))
            self._set(asked.index, asked.start, [*events, *missing])
        else:
            chosen = asked.chosen or (True,) * asked.count
            for number, meant in enumerate(chosen, asked.start):
                if meant:
                    self._function.trigger(asked.index, number)

    def clear_all(self) -> None:
        for index, events in enumerate(self._events):
            self._set(index, 0, [None] * len(events))

    def _set(self, index: int, start: int, events: Sequence[IrqEvent | None]) -> None:
        """Of each number the event before goes when the function has the new one."""
        if not events:
            return
        place = slice(start, start + len(events))
        before, self._events[index][place] = self._events[index][place], events
        self._function.set_irqs(index, start, events)
        for event in before:
            if event is not None:
                event.close()
