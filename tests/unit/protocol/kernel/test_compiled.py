"""Who is given code that works on his memory."""

from __future__ import annotations

import threading

from protocol.kernel.linux import Linux
from protocol.kernel.port import Kernel
from protocol.units import PAGE_SIZE


def test_compiled_code_comes_to_real_memory_alone(kernel: Kernel) -> None:
    """In memory nobody could come between two of its accesses, so it never comes."""
    fd, memory = kernel.memfd("memory", PAGE_SIZE, peer_writes=True)
    came: list[str] = []
    threads = set(threading.enumerate())
    for module in ("there.is.none", "json.tool"):
        memory.compiled(module, lambda module: came.append(module.__name__))
    for loading in set(threading.enumerate()) - threads:
        loading.join()
    assert came == (["json.tool"] if isinstance(kernel, Linux) else [])
    kernel.close(fd)
