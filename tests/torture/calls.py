"""The system calls of a process, what each may fail with, and what can befall a process at one.

The names are the kernel's; errnos are those of the manual pages that a call of ours on a success path can get
[man 2].  One without errnos (close) can be died at and stopped at all the same.

What the model takes from its own pools is an allocation too, which the kernel it models may be refused
[alloc_pages]: a frame of the host, a page for a table.
"""

from __future__ import annotations

import errno as e
from collections.abc import Set
from enum import IntEnum
from typing import Final

NO_FILE = (e.EMFILE, e.ENFILE, e.ENOMEM)

ERRNOS: Final[dict[str, tuple[int, ...]]] = {
    "socket": (e.EMFILE, e.ENFILE, e.ENOBUFS),
    "socketpair": NO_FILE,
    "bind": (e.ENOSPC, e.ENOMEM, e.EACCES, e.EROFS),
    "listen": (e.EADDRINUSE,),
    "accept": (e.EAGAIN, e.ECONNABORTED, *NO_FILE),
    "connect": (e.ECONNREFUSED, e.EAGAIN, e.ENOENT, e.ENOMEM),
    "send": (e.EAGAIN, e.EPIPE, e.ECONNRESET, e.ENOBUFS, e.ENOMEM),
    "sendmsg": (e.EAGAIN, e.EPIPE, e.ECONNRESET, e.ETOOMANYREFS, e.ENOMEM),
    "recvmsg": (e.EAGAIN, e.ECONNRESET, e.ENOMEM),
    "dup": (e.EMFILE,),
    "close": (),
    "chmod": (e.EPERM, e.EROFS),
    "rename": (e.ENOSPC, e.EACCES, e.EROFS),
    "unlink": (e.EACCES, e.EROFS, e.ENOMEM),
    "open": NO_FILE,
    "fstat": (e.ENOMEM,),
    "epoll_create": NO_FILE,
    "epoll_ctl add": (e.ENOMEM, e.ENOSPC),
    "epoll_ctl mod": (e.ENOMEM,),
    "epoll_ctl del": (e.ENOMEM,),
    "eventfd": NO_FILE,
    "eventfd write": (e.EAGAIN,),
    "own eventfd write": (),  # nobody else has it, so there is room [Linux fs/eventfd.c]
    "eventfd read": (e.EAGAIN,),
    "memfd_create": NO_FILE,
    "ftruncate": (e.ENOMEM, e.ENOSPC, e.EFBIG),
    "mmap": (e.ENOMEM, e.EAGAIN, e.ENFILE),
    "madvise": (e.ENOMEM,),
    "fcntl": (e.EBUSY,),
    "fchmod": (e.EPERM,),
    "frame": (e.ENOMEM,),
    "table page": (e.ENOMEM,),
}
CALLS: Final = tuple(ERRNOS)

SENDS: Final = frozenset({"send", "sendmsg"})
ALLOCATIONS: Final = frozenset({"frame", "table page"})  # nobody else knows of one
SYSTEM_CALLS: Final = ERRNOS.keys() - ALLOCATIONS
MESSAGES: Final = SENDS | {"recvmsg"}
TELLS: Final = SENDS | {"eventfd write"}  # after these somebody else knows what we did
PIECES: Final = frozenset({"send", "recvmsg"})  # without fds: what carries some arrives whole [af_unix.c]


class Fault(IntEnum):
    """What befalls the process.  From LEAK_FD on: mistakes, which the judges are to find."""

    NOTHING = 0
    KILL = 1  # before the call
    KILL_AFTER = 2  # after a message or a kick, before anything else
    KILL_WITHIN = 3  # half of the message is out
    STOP = 4  # SIGSTOP; who watches lets it go on
    FAIL = 5  # with one errno after the other
    SHORT = 6  # a part is sent or received
    HALF_READ = 7  # the socket is shut down for reading, by us
    HALF_WRITE = 8  # for writing
    NO_FDS = 9  # from here on nothing more can be opened [RLIMIT_NOFILE]
    FULL_DISK = 10  # from its start on, behind its log and its trace
    FULL_PIPE = 11  # behind its log, which nobody reads
    LEAK_FD = 12
    LEAK_MEMORY = 13
    SILENT = 14  # a message is said to be sent, and is not
    HANG = 15  # the call never returns

    @property
    def kind(self) -> str:
        """As people write it."""
        return self.name.lower().replace("_", "-")


FAULTS: Final = {fault.kind: fault for fault in Fault if Fault.NOTHING < fault < Fault.LEAK_FD}
SINKS: Final = frozenset({Fault.FULL_DISK, Fault.FULL_PIPE})  # of a daemon, and at no call of its own
DEATHS: Final = frozenset({Fault.KILL, Fault.KILL_AFTER, Fault.KILL_WITHIN})

AT: Final[dict[Fault, Set[str]]] = {
    Fault.KILL: SYSTEM_CALLS,
    Fault.KILL_AFTER: TELLS,
    Fault.KILL_WITHIN: frozenset({"send"}),
    Fault.STOP: SYSTEM_CALLS,
    Fault.FAIL: frozenset(name for name, errnos in ERRNOS.items() if errnos),
    Fault.SHORT: PIECES,
    Fault.HALF_READ: MESSAGES,
    Fault.HALF_WRITE: MESSAGES,
    Fault.NO_FDS: frozenset({"recvmsg"}),
    Fault.FULL_DISK: frozenset(),
    Fault.FULL_PIPE: frozenset(),
    Fault.LEAK_FD: MESSAGES,
    Fault.LEAK_MEMORY: MESSAGES,
    Fault.SILENT: SENDS,
    Fault.HANG: MESSAGES,
}
assert AT.keys() == set(Fault) - {Fault.NOTHING}
