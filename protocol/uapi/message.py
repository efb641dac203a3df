"""The base of every message, and the field types: kernel widths, checked when a message is read.

One pydantic model per kernel struct, field names kept.  Strict: no coercion, no unknown field, nothing
changes after it was checked.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

U8 = Annotated[int, Field(ge=0, lt=1 << 8)]
U16 = Annotated[int, Field(ge=0, lt=1 << 16)]
U32 = Annotated[int, Field(ge=0, lt=1 << 32)]
U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
S64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
MAX_TRANSFER = 1 << 20  # bytes of memory one message carries
MAX_TOLD = 1024  # objects of which one STATS tells: whoever has more asks again; sentences of one CHECK

Name = Annotated[str, Field(min_length=1, max_length=64)]


class Checked(BaseModel):
    """What was read from a peer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Message(Checked):
    """A request or a notification; `op` says which, and was looked at before the rest is checked.

    A validator is built when the first message of its kind comes: most never do in one run.
    """

    model_config = ConfigDict(defer_build=True)

    op: str


Window = Annotated[tuple[Name, U64, Annotated[int, Field(gt=0, lt=1 << 52)]], Field(strict=False)]
MAX_WINDOWS_LENT = 7  # and the lease: what one message may carry
Windows = Annotated[list[Window], Field(min_length=1, max_length=MAX_WINDOWS_LENT)]


class LentReply(Checked):
    """Memory that is lent, (kind, base, size) each; with an fd each, and then the lease."""

    windows: Windows


def as_told(violations: list[str]) -> list[str]:
    """What CHECK answers: an answer has a size, and one broken table breaks every entry of it."""
    more = len(violations) - MAX_TOLD
    return violations if more <= 0 else [*violations[:MAX_TOLD], f"and {more} more"]


class StartedWith(Message):
    """Asked at a daemon's front door; reply: `options`, one string an option (`protocol/started_with.py`)."""


class Ioctl(Message):
    """A request of a process to an object of the kernel.

    `argp`: where in its memory the struct lies, if that is to be checked.  `other_mm`: the last fd is the mm
    of the calling process; without it the caller is the process that made the VM.
    """

    argp: U64 | None = None
    other_mm: bool = False
