"""What an error of the kernel's says to a user: what was asked of it, what stood in the way, what to do.

The C library has one sentence an errno, which names neither the call nor its object [strerror(3)].  Whoever
asks adds what he asked for; the errno stays what callers tell errors apart by.
"""

from __future__ import annotations

import errno as e
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from protocol.errors import UapiError

_OTHER_PATH = "choose another path"
_NOTHING_ELSE: Final[Mapping[int, str]] = {}
_MEMORY = "free memory, or ask for less of it"
TO_DO: Final = {
    e.EMFILE: "raise this process's limit of open files (ulimit -n)",
    e.ENFILE: "raise the machine's limit of open files (sysctl fs.file-max)",
    e.ENOMEM: _MEMORY,
    e.ENOBUFS: _MEMORY,
    e.ENOSPC: "make room, or raise the limit that is met",
    e.EFBIG: "raise this process's limit of file sizes (ulimit -f), or ask for less",
    e.EAGAIN: "try again",
    e.EBUSY: "try again",
    e.EPERM: "ask with more rights",
    e.EACCES: f"{_OTHER_PATH}, or ask with more rights",
    e.EROFS: _OTHER_PATH,
    e.EEXIST: _OTHER_PATH,
    e.EADDRINUSE: _OTHER_PATH,
    e.ENOENT: "start who is to listen there",
    e.ECONNREFUSED: "start who is to listen there",
}
"""An errno that is missing here is a mistake of ours or of a peer's, and nothing a user can mend."""


def told(
    error: OSError, what: str, path: str | None = None, instead: Mapping[int, str] = _NOTHING_ELSE
) -> OSError:
    """The same error, `what` could not be done said first; of the class that its errno has.  `instead` is
    what to do where this call means something else by an errno.
    """
    number = error.errno or e.EIO
    why = error.strerror or os.strerror(number)
    said = "; ".join(filter(None, (f"{what}: {why}", {**TO_DO, **instead}.get(number))))
    return OSError(number, said) if path is None else OSError(number, said, path)


@contextmanager
def asked(what: str, path: str | None = None, instead: Mapping[int, str] = _NOTHING_ELSE) -> Iterator[None]:
    """An OSError that leaves it says that `what` could not be done."""
    try:
        yield
    except OSError as error:
        raise told(error, what, path, instead) from None


def refusal(error: OSError, what: str) -> UapiError:
    """What `error` is to whoever asked us for what it kept us from; `what` as in "no file for a new VM"."""
    return UapiError(error.errno or e.EMFILE, f"{what}: {error.strerror}")
