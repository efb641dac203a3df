"""Memory that processes share: made so that it cannot shrink, and mapped from a peer only if it cannot.

A load beyond the end of a file is SIGBUS, which no process survives that did not mean to.  So what a peer
gives is asked for its seals, which cannot be taken off again [Linux mm/memfd.c], and then for its size; the
answer holds for as long as it is mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import ExitStack

F_SEAL_FUTURE_WRITE = 0x10  # not in the fcntl module before Python 3.13


def make_shared(name: str, size: int, *, peer_writes: bool) -> tuple[int, mmap.mmap]:
    """A memfd of zeroes that nobody can resize, mapped; unless the peer writes, this mapping is the only one
    there can be that stores, whatever happens to copies of the fd.  OSError.
    """
    with ExitStack() as undo:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, fd)
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
        undo.callback(mapping.close)  # it has a copy of the fd
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals if peer_writes else seals | F_SEAL_FUTURE_WRITE)
        if not peer_writes:
            os.fchmod(fd, 0o400)  # a re-open for writing fails as well, but for root
        undo.pop_all()
    return fd, mapping


def map_peer(fd: int, size: int, *, writable: bool) -> mmap.mmap:
    """The first `size` bytes.  ValueError: smaller, or free to become so; OSError: the system's answer."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("no memfd, so nothing keeps it from shrinking") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError("it may shrink under us: seal it (F_SEAL_SHRINK)")
    if os.fstat(fd).st_size < size:
        raise ValueError("larger than its file")
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
