"""What is done to all of 1 GiB in 4 KiB pages: to its leaves in kvmd's core, and to its memslot from outside.

Leaves are held against a C loop that loads and stores each entry by itself.  Memslots are held against a real
KVM that has two-dimensional page tables, where this machine has one, and against what one took elsewhere.
"""

from __future__ import annotations

from bench.contenders import CRival, Given, InParts, Program
from bench.harness import AtMost, Bench, Figure, NotMeasuredError, Row
from bench.ours.ranges import pages_of
from protocol.units import GIB, PAGE_SIZE

KVM = InParts(CRival("KVM", "kvm_log.c"))
C_LOOP = InParts(CRival("C loop", "leaves.c"))


class OfOneGib(Given):
    """What was taken of 1 GiB, and is no limit of less."""

    def prepare(self, bench: Bench) -> None:
        if pages_of(bench.samples) * PAGE_SIZE != GIB:
            raise NotMeasuredError("it is of 1 GiB, and fewer samples are of less")


def _count(bench: Bench) -> tuple[str, ...]:
    return (str(bench.samples),)


SLOT = InParts(Program("a memslot", module="bench.ours.ranges", args=_count))
LEAVES = InParts(Program("leaves", module="bench.ours.leaves", args=_count))

# What a real KVM took, and how much of it may be taken here.
STEPS = {
    "get clean": (0.063, 1),
    "get all dirty": (7.0, 0.2),
    "clear": (8.2, 0.2),
    "logging on": (11, 0.2),
    "delete a slot": (11.6, 1),
    "DONTNEED": (11.6, 1),
}

RANGES = Figure(
    "ranges",
    "all of 1 GiB in 4 KiB pages",
    (
        *(
            Row(LEAVES.part(change), C_LOOP.part(change), AtMost(1.2))
            for change in ("zap", "write-protect", "age")
        ),
        *(
            Row(SLOT.part(step), OfOneGib(f"a KVM, elsewhere: {ms:g} ms", ms * 1e6), AtMost(share))
            for step, (ms, share) in STEPS.items()
        ),
        *(Row(SLOT.part(step), KVM.part(step), AtMost(share)) for step, (_, share) in STEPS.items()),
    ),
)
