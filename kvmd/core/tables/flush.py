"""Remote TLB flushes of one VM: numbered, told to everybody who walks the table, awaited.

Models kvm_flush_remote_tlbs with the RFC's notification [RFC 41/42], [RFC 42/42]: vCPUs drop their
translations first, then every importer of every exported TDP is told, and the flush is over when all
have acked.  Each flush is an epoch; `acked` is the epoch up to which nobody uses old translations any
more, and the only permission there is to reuse a table page or a frame (I6, I7, R17).

Why nobody uses what is given away.  Three interleavings would break it:

 1. Two flushes under way, the younger acked first.  Its caller goes on, and with it would go the table pages
    that wait for the older one.  `acked` is therefore the youngest epoch before the *oldest* outstanding one,
    not the youngest acked (tests/unit/kvmd/test_flush.py::test_acks_out_of_order_free_no_page_too_early).
 2. A clears an entry, tells, and sleeps for the ack; B wants the frame gone, finds the entry clear, has
    nothing to flush, and frees the frame under the walker that A waits for.  Whoever found nothing to clear
    sleeps in `drain` until every flush before its own call is over (tests/properties/test_kvmd.py, planted:
    "B-18-drain-is-skipped").
 3. A walker registers, or caches again, while a flush is under way.  All are told in one turn, by `_tell`,
    before the first ack is waited for; who comes later finds the entries cleared already, and has nothing old
    (tests/unit/kvmd/test_flush.py::test_all_walkers_are_told_before_anyone_is_waited_for).
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.flow import Wait
from protocol.pt.table_pool import TablePool
from protocol.units import GfnSpan

# Tell all walkers to drop `span` (None: everything); one Wait for each that has not done so yet.
Tell = Callable[[GfnSpan | None, int], list[Wait[None]]]


class Flusher:
    def __init__(self, vm_id: int, pool: TablePool, tell: Tell) -> None:
        self.epoch = 0
        self._vm_id = vm_id
        self._pool = pool
        self._tell = tell
        self._outstanding: dict[int, Wait[None]] = {}

    def next_epoch(self) -> int:
        """The epoch of the next flush.  Unlink under it, then flush before anything else runs."""
        return self.epoch + 1

    @property
    def acked(self) -> int:
        return min(self._outstanding, default=self.epoch + 1) - 1

    # awaits: epoch, over, each wait: cannot change: of this flush; who registers later has cached nothing
    # older
    async def flush(self, span: GfnSpan | None) -> None:
        """Returns when no vCPU and no importer uses a translation of `span` older than this call."""
        self.epoch += 1
        epoch = self.epoch
        over: Wait[None] = Wait()
        self._outstanding[epoch] = over
        for wait in self._tell(span, epoch):
            await wait
        del self._outstanding[epoch]
        over.set(None)
        self.reclaim()

    def reclaim(self) -> None:
        """Reuse what was held for flushes that are over."""
        self._pool.reclaim(self._vm_id, self.acked)

    # awaits: each wait: cannot change: a copy; flushes issued later are not waited for
    async def drain(self) -> None:
        """Returns when every flush issued before this call is acked.

        Whoever zaps and finds nothing to zap must still wait here: another flow may have cleared the
        same entries and be waiting for the acks (defect B-18's second half).
        """
        for wait in list(self._outstanding.values()):
            await wait
