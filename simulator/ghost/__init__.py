"""The ghost history: what was true of every page at every step, and the judges that look at each access.

Models nothing: it stands beside the system and is told what happens, in plain numbers.  Its time is a count
of what it was told (an epoch), so that of any two things it knows which came first.

A translation may be out of date for a while, and the judges have to know for how long.  Too strict and they
cry wolf, too lax and they find nothing.  A page goes from frame to frame in this order, and each step may be
taken only when the one before is over:

 1. The host announces the change to whoever maps the page by other means [mm mmu_notifier.c].
 2. Each of them clears its entries.  From then on the old translation *has ended*; caches may have it still,
    and use it: it is the page's frame all the same.
 3. Each flushes: CPUs by INVEPT, units by descriptors and a wait [VT-d 6.5.2].  When the wait is complete
    (its status is stored, the driver acks) no cache of that unit or of a function behind it may have a
    translation that ended before the flush was issued, nor a pointer to a table that was cut off (`Caches`).
    One that ended later may stay: it is another flush's.
 4. When all have acked the flush is over, for the CPUs' caches too.  Who knows of the announcement stores no
    new entry for the page until he hears that the change is made: KVM from the call on, a mirror in another
    process from its answer on.
 5. The host makes the change.  No entry of anybody's leads to the old frame now, and no cache (`Backing`).
    An access through it from here on is lost, or of another's memory, whatever becomes of the frame.
 6. The frame is given up, and a table page that was cut off is used again.  Nothing leads there (`Ledger`).

A right that is taken goes the same way.  A page pinned for a device stays in its frame whatever the host has
at the address by now; it is taken out, flushed and unpinned, in that order.  An entry is judged where it is
stored: one for a page that was taken back before is wrong in that step, though nobody use it and the next
change remove it.

`spans` and `tables` are what they stand on: runs of pages, and the tables as their words have them.  `Ghost`
(ghost.py) is told everything; `groups`, `stores` and `liveness` are its books on page requests, on what dirty
logs must tell, and on what must end; `host` judges what leads to a page by what the host has behind it,
`accesses` what is reached there; `sharing` who may write what several processes have, `held` whether as much
is pinned as somebody has; and `faults`, `lent` and `entries` what is wrong whatever came before it: a fault's
way, a root's second borrower, an entry by itself.  `heard` says for a search which orders of what happens the
ghost can tell apart.
"""
