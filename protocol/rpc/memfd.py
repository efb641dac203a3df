"""Memory of a peer, mapped: only what cannot shrink under us.

A load beyond the end of a file is SIGBUS, which no process survives that did not mean to.  So what a peer
gives is asked for its seals, which cannot be taken off again [Linux mm/memfd.c], and then for its size; the
answer holds for as long as it is mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import os


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
