"""Both kernels, for each test of what a process asks of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol.kernel.linux import Linux
from protocol.kernel.port import Kernel
from simulator.kernel.process import SimHost, SimProcess
from tests.unit.protocol.kernel.asking import Pair


@pytest.fixture(params=["linux", "memory"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Linux() if request.param == "linux" else SimProcess(SimHost())


@pytest.fixture
def pair(kernel: Kernel) -> Iterator[Pair]:
    one, other = kernel.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    yield one, other
    one.close()
    other.close()
