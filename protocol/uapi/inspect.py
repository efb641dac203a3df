"""What kvmd answers to whoever debugs it: debugfs and /proc/vmcore, so to speak.

A request names a VM by the VM fd sent along, when `vm` is None, or, at the administrator's door, by its
number (EPERM elsewhere).  Each is answered in one turn of kvmd's, so an answer is a state the VM was in,
however busy it is.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.uapi.message import U32, U64, Message

MAX_PROBES = 1 << 14
MAX_SLOTS_TOLD = 1 << 12


class _OfVm(Message):
    vm: U32 | None = None


class Inspect(_OfVm):
    """The VM's memslots (the first MAX_SLOTS_TOLD), roots, exported TDPs and their importers, counters."""


class InspectGpa(_OfVm):
    """The entries a walk to `gpa` meets, and what the CPU and the remapping unit make of them.  ENOENT: the
    VM has no root yet; EINVAL: `gpa` is beyond what the root translates.
    """

    gpa: U64


class DumpTables(_OfVm):
    """The table of the VM and about `probes` addresses with what a walk of it must find (decision 0010).

    The reply carries a file with the table pages.  ENOENT: the VM has no root yet; EFBIG: too many pages.
    """

    probes: Annotated[int, Field(ge=1, le=MAX_PROBES)] = 4096
