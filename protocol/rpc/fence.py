"""A full fence, for two processes that watch each other's words in shared memory.

x86 keeps loads in order and stores in order, and lets a load overtake an earlier store to another word only
[SDM 9.2].  Who stores a word and then looks whether the other side stored its own needs a fence between
the two, or both may look too early.  Python has none; taking a lock is one: it synchronizes memory
[POSIX 4.12], with a locked instruction.
"""

from __future__ import annotations

import threading
from typing import Final

_LOCK: Final = threading.Lock()  # nobody else takes it


def full_fence() -> None:
    """Every store before is seen by everybody before any load after it is made."""
    with _LOCK:
        pass
