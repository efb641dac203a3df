"""The three ways things go wrong, told apart by who is to blame.

UapiError   the caller asked for something that cannot be: an errno and a sentence, sent back to it.
PeerError   the other end broke the protocol: its connection is closed, nothing else happens.
ModelBug    we broke a promise of ours: it is logged with its traceback and the daemon's exit status shows it.
"""

from __future__ import annotations

import errno as _errno
from typing import Final

EHWPOISON: Final = 133  # Linux's; Python has no name for it before 3.14


class UapiError(Exception):
    """`errno` as the kernel would return it (positive), `why` what was asked and what stood in the way."""

    def __init__(self, errno: int, why: str) -> None:
        super().__init__(f"[{errno_name(errno)}] {why}")
        self.errno = errno
        self.why = why


class PeerError(Exception):
    """The bytes, fds or message order of a peer are not the protocol."""


class ModelBug(Exception):
    """An invariant of ours does not hold; the message names it."""


MAX_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """What a peer sent, for a message: whatever it is, a line with a bound that costs no more than that."""
    if isinstance(value, str | bytes):
        return repr(value[:MAX_SHOWN_CHARS])
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:MAX_SHOWN_CHARS]


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors themselves, out of however many groups they came wrapped in."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


# Linux has one number for both; the kernel's documents say the second.
_NAMES: dict[int, str] = {**_errno.errorcode, _errno.EOPNOTSUPP: "EOPNOTSUPP", EHWPOISON: "EHWPOISON"}


def errno_name(errno: int) -> str:
    return _NAMES.get(errno, f"errno {errno}")
