"""What each process does before its first machine."""

from __future__ import annotations

import gc
import logging
from functools import cache

import structlog


def settle() -> None:
    """What daemons log is nobody's here, and what is imported is not looked at behind each machine again: a
    machine that is cut off is collected, and the modules were half of what it takes.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        cache_logger_on_first_use=True,  # as a daemon does (protocol/daemon.py): else each line makes one
    )
    _freeze_once()


@cache
def _freeze_once() -> None:
    freeze()


def freeze() -> None:
    """What there is now is not looked at again."""
    gc.collect()
    gc.freeze()
