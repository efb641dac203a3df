"""The host's memory as another MMU uses it: what iommufdd asks of kvmd, and is told by it.

Models get_user_pages with FOLL_LONGTERM [mm gup.c], hmm_range_fault [mm hmm.c] and mmu_interval_notifier
[mm mmu_notifier.c], which a driver in the kernel has by function call.  A channel stands for one address
space and one user of it; it is no reference on the process: after its exit nothing can be watched, faulted
(EPERM) or pinned (EFAULT), while what was can be given back.  What comes before HMM_REGISTER is EINVAL.

Addresses are the process's (hva), in bytes.  A page in a reply is `[hva, hpa, size, writable]`: a page of the
host with its own size, however much of it was asked for, and whether it may be written.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi.message import U64, Checked, Message
from protocol.units import PAGE_SIZE

MAX_PAGES = 1024  # of one reply; the caller asks again for the rest

Bytes = Annotated[int, Field(ge=PAGE_SIZE, lt=1 << 57, multiple_of=PAGE_SIZE)]
Address = Annotated[int, Field(ge=0, lt=1 << 57, multiple_of=PAGE_SIZE)]
Physical = Annotated[int, Field(ge=0, lt=1 << 52, multiple_of=PAGE_SIZE)]


class HmmMirrorGet(Message):
    """At kvmd's door for importers (EPERM elsewhere), with an mm fd (EINVAL if it is something else); the
    reply carries the channel.
    """


class HmmRegister(Message):
    """Once, before anything else.  Reply: `windows` [[kind, base, size]...] of frames, fds: one each, then
    the lease: whoever walks tables of these frames keeps it open.  EBUSY: registered; EPERM.  Closing the
    channel ends it once the lease has ended: then nothing is told and nothing is pinned any more.

    `account`: what its pins count in, against RLIMIT_MEMLOCK: user->locked_vm or mm->locked_vm.
    """

    account: Literal["user", "mm"] = "user"


class HmmWatch(Message):
    """Be told before start..start+size changes (mmu_interval_notifier_insert).  EEXIST: overlaps another;
    ENOMEM: too many; EPERM.
    """

    start: Address
    size: Bytes


class HmmUnwatch(HmmWatch):
    """A range as it was watched; nothing is sent of it once this is answered.  ENOENT."""


class HmmRangeFault(Message):
    """The pages of start..start+size as they are now; or, if `fault`, the page at `start` faulted in, for a
    write if `write`, and those behind it as long as the host has plenty of memory: they are a guess.

    The range must be in one watched range (EINVAL).  It waits while an invalidation of the range is in
    progress.  Reply: `pages`, at most MAX_PAGES, in order, absent ones left out; `end`: where it stopped, to
    go on from (behind `start`, perhaps without a page if it only looked); `major`: how many were read back
    from swap.  EFAULT, EHWPOISON, ENOMEM, EPERM; EBUSY: taken away each time, ask again.
    """

    start: Address
    size: Bytes
    write: bool
    fault: bool = True


Page = Annotated[tuple[Address, Physical, Bytes, bool], Field(strict=False)]  # as said above


class HmmFoundReply(Checked):
    """Of HMM_RANGE_FAULT and HMM_PIN."""

    pages: Annotated[list[Page], Field(max_length=MAX_PAGES)]
    end: Annotated[int, Field(gt=0, le=1 << 57, multiple_of=PAGE_SIZE)]
    major: U64 = 0


class HmmPinnedReply(Checked):
    pins: list[Annotated[tuple[Address, Physical, Bytes], Field(strict=False)]]
    end: Annotated[int, Field(gt=0, le=1 << 57, multiple_of=PAGE_SIZE)]
    total: U64


class HmmFileReply(Checked):
    file: Annotated[int, Field(gt=0, lt=1 << 64)]


class HmmFileGet(Message):
    """With a memfd, to pin pages of; reply: `file`, its number, until HMM_FILE_PUT.  EINVAL: no memfd."""


class HmmFilePut(Message):
    """What is pinned stays pinned.  EINVAL: no such file."""

    file: U64


class HmmPin(Message):
    """Pin the pages of start..start+size for long, for writing if `write`.  Reply as of HmmRangeFault; a
    failure leaves nothing pinned by this call.  ENOMEM: RLIMIT_MEMLOCK, or no memory; EFAULT: no memory
    there, or no process any more; EHWPOISON.

    `area` is the caller's name for what the pins belong to: the process may map something else at an address
    that is pinned, and another area pin that; each gets its own back.  With a `file` of HMM_FILE_GET, start
    is an offset in it (EINVAL: beyond its end) and it takes no process any more.
    """

    start: Address
    size: Bytes
    write: bool
    area: U64 = 0
    file: U64 = 0


class HmmUnpin(Message):
    """Pages that `area` pinned in start..start+size, once each; reply: `pages`, how many there were.  A page
    is found by the first byte of it that was asked for when it was pinned.
    """

    start: Address
    size: Bytes
    area: U64 = 0


class HmmPinned(Message):
    """What `area` has pinned in start..start+size, for a check of who believes so.  Reply: `pins`, at most
    MAX_PAGES, in order: `[hva, hpa, size]` of what was asked for of each page, as far as the page goes;
    `end`: where it stopped, to go on from; `total`: the pins of this channel, of whichever area.
    """

    start: Address
    size: Bytes
    area: U64 = 0


class HmmChangeProcess(Message):
    """With an mm fd: that process pays for what is pinned and what will be.  ENOMEM: RLIMIT_MEMLOCK, and
    nothing has changed; EINVAL: ranges are watched, or pinned by address; EPERM.  `undo`, without a fd: as it
    was before.
    """

    undo: bool = False


class HmmInvalidate(Message):
    """kvmd to iommufdd: start..start+size is about to change: what of the change lies between the first and
    the last watched byte it meets, in one message, which may span several watched ranges.  The reply, sent
    when nobody can use a translation of it any more, is the ack.
    """

    start: U64
    size: U64
    seq: Annotated[int, Field(ge=1)]
