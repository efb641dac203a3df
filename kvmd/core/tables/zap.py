"""Long work on a VM's tables, in turns: leaves cleared and flushed, dead roots taken apart.

Models the yielding of the TDP MMU's iterator [KVM tdp_mmu.c]: after so many entries everybody else gets a
turn, but what was cleared so far is flushed first.  Whoever runs in between finds the entries gone and
nothing to flush, and would give their frames away under a walker (I6, defect B-33).

Three things stand between two batches, and their order is the argument:

 - `flush` before `cond_resched`.  The other way round, whoever runs in between drains an epoch that was never
   told (tests/unit/kvmd/test_zap_batches.py::test_a_turn_given_before_the_flush_is_noticed).
 - `root in roots` at each turn, `cursor.resume()` after it: a table on the cursor's way may have been cut
   off, and its page be another's by now (::test_a_table_that_goes_between_two_batches_is_not_walked_on).
 - `drain` at the end, also when nothing was cleared: somebody else's batch may be waiting for its acks
   (tests/properties/test_kvmd.py, planted: "B-18-drain-is-skipped").

Nothing refills what was cleared while others run: a fault on the range waits for whoever called
(`HostChanges.is_changing`, `Memslots.going`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import Root, RootState, TdpMmu
from protocol.flow import Wait
from protocol.units import GfnSpan

ZAP_BATCH = 4096  # leaves cleared before others get a turn, unless said
COMPILED_BATCH = 1 << 16  # where compiled code does it, in less time
DISMANTLE_BATCH = 16  # tables taken apart before others get one: each may hold 512 leaves to count


class Zapper:
    """Of one VM; `batch` leaves are cleared before others get a turn, as many as take little time unless
    said."""

    def __init__(
        self,
        mmu: TdpMmu,
        flusher: Flusher,
        cond_resched: Callable[[], Wait[None]],
        batch: int | None = None,
    ) -> None:
        self.batch = batch
        self._mmu = mmu
        self._flusher = flusher
        self._cond_resched = cond_resched

    @property
    def _a_turns(self) -> int:
        """Leaves."""
        if self.batch is not None:
            return self.batch
        return ZAP_BATCH if self._mmu.compiled.kernels is None else COMPILED_BATCH

    # awaits: each root, root: cannot change: copies; a root that was dropped meanwhile is passed by | cursor:
    # tables on its way may go, and their pages be others; asked again: `Cursor.resume`
    # (tests/unit/kvmd/test_zap_batches.py::test_a_table_that_goes_between_two_batches_is_not_walked_on)
    async def zap(
        self,
        spans: Iterable[GfnSpan],
        roots: Iterable[Root] | None = None,
        *,
        told: GfnSpan | None = None,
        unflushed: bool = False,
    ) -> None:
        """Clear every leaf that overlaps `spans`, in `roots` or in all; tables stay.  It returns when nobody
        can use one of them any more.  Walkers are told `told`, or everything; `unflushed`: something is to
        be flushed already.
        """
        roots = list(self._mmu.roots if roots is None else roots)
        budget = self._a_turns
        for root, span in [(root, span) for span in spans for root in roots]:
            cursor = self._mmu.cursor(root, span)
            while root in self._mmu.roots:  # it may go while others run
                count = tdp_mmu.zap_some(self._mmu, root, cursor, budget)
                budget -= count
                unflushed |= count > 0
                if budget:
                    break
                await self._flusher.flush(told)
                await self._cond_resched()
                cursor.resume()
                budget, unflushed = self._a_turns, False
        if unflushed:
            await self._flusher.flush(told)
        await self._flusher.drain()

    # awaits: each root, obsolete: cannot change: copies; under the slots_lock, and `zap` and `dismantle`
    # pass by a root that went
    async def zap_all_fast(self, as_id: int = 0, going: GfnSpan | None = None) -> None:
        """Other roots become obsolete, exported ones lose their leaves [RFC 36/42], or as their policy
        has it only those of what is `going`, a slot of address space `as_id`.  Under the slots_lock."""
        unflushed = self._mmu.invalidate_roots()
        obsolete = [root for root in self._mmu.roots if root.state is RootState.INVALID]
        for root in [root for root in self._mmu.roots if root.exported]:
            lost = _lost_by(root, as_id, going)
            if lost:
                await self.zap(lost, [root], unflushed=unflushed)
                unflushed = False
        if unflushed:
            await self._flusher.flush(None)
        await self._flusher.drain()
        await self.dismantle(obsolete)

    # awaits: each number, each root: cannot change: a copy; nobody walks these roots, and who drops one
    # meanwhile finds it dismantled
    async def dismantle(self, roots: Iterable[Root]) -> None:
        """Take apart roots that nobody walks since the last flush."""
        for root in list(roots):
            for number, _ in enumerate(tdp_mmu.dismantle(self._mmu, root), 1):
                if number % DISMANTLE_BATCH == 0:
                    self._flusher.reclaim()
                    await self._cond_resched()
        self._flusher.reclaim()


def _lost_by(root: Root, as_id: int, going: GfnSpan | None) -> list[GfnSpan]:
    """What a lent root has no leaf of after a slot change."""
    if root.role.policy.zapped_whole:
        return [root.everything]
    return [going] if going is not None and as_id == root.role.as_id else []
