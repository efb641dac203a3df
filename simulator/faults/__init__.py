"""Faults as choices: what fails, stops, dies or is forgotten, and when, is part of the schedule.

Before the part of a run that is searched begins, the strategy is asked of each kind whether there is to be
one, and at which of its opportunities (`Faults`): a few answers like any other, whose default is "never", so
that a schedule without them is one without faults, and a shrunk story has only those it needs.  The product
has no line for it: `injected` wraps methods of its classes, and of the kernel in memory, while faults are on
(seams.py).  `playing_faulted` says what must hold all the same.
"""
