"""Ctrl-C and SIGTERM: the first one cancels what is being done, more of them change nothing.

With the exit statuses of commands, of which being interrupted is one.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_NO_READER = 141  # as the shell calls SIGPIPE
SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def interruptible(work: Callable[[], Awaitable[None]]) -> bool:
    """Whether no signal came.  After one, others are ignored: while `work` stops what it has running, and
    until the process ends.
    """
    scope = trio.CancelScope()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        await _watched(work, scope)
    finally:
        if not scope.cancel_called:
            for number, handler in before.items():
                signal.signal(number, handler)
    return not scope.cancel_called


async def _watched(work: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    async with trio.open_nursery() as nursery:

        async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            with trio.open_signal_receiver(*SIGNALS) as signals:
                task_status.started()
                async for _ in signals:
                    scope.cancel()

        await nursery.start(watch)
        with scope:
            await work()
        nursery.cancel_scope.cancel()
