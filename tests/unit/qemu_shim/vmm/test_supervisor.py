"""A system that does not start says what stood in the way, and not what stopping it did to the others."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import trio

from qemu_shim.vmm import supervisor
from qemu_shim.vmm.daemons import DaemonSpec
from qemu_shim.vmm.supervisor import DaemonFailed, supervised

STUB = "tests.unit.qemu_shim.vmm.stub_daemon"
SLOW, FAILING = DaemonSpec("slow", "slow", STUB), DaemonSpec("failing", "failing", STUB)


@pytest.fixture(autouse=True)
def sigterm_ends_who_does_not_handle_it() -> Iterator[None]:
    """What ignores a signal hands that on to its children; a test of interrupted runs leaves us so."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


async def why_not(*daemons: DaemonSpec) -> str:
    with pytest.raises(DaemonFailed) as caught:
        async with supervised({"failing": ["--fail"]}, daemons=daemons):
            raise AssertionError("ready")
    return str(caught.value)


async def test_a_daemon_that_fails_is_named_and_not_those_that_had_just_begun() -> None:
    """SIGTERM ends one that has not got so far as to handle it, with status -15."""
    why = await why_not(FAILING, SLOW)
    assert "failing ended with status 2:\n    out of memory" in why
    assert "slow" not in why


async def test_a_daemon_that_is_not_ready_in_time_is_told_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_PATIENCE_S", 0.3)
    why = await why_not(SLOW)
    assert why.startswith("slow is not ready after")
    assert "status" not in why


async def test_one_that_was_ready_and_ends_by_sigterm_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted bug: a daemon that lost its handlers."""
    ready = trio.Event()
    ready.set()
    monkeypatch.setattr(supervisor.Supervisor, "_wait_socket", lambda self, socket: ready.wait())
    with pytest.raises(DaemonFailed, match="slow ended with status -15"):
        async with supervised(daemons=(SLOW,)):
            pass
