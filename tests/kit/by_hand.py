"""Flows that a test drives: everything that can run does, then the test has its turn."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from protocol.flow import Flows, Wait

T = TypeVar("T")


class ByHand:
    """What a world of cores stands on."""

    def __init__(self) -> None:
        self.flows = Flows()

    def run(self, flow: Coroutine[Any, None, T]) -> T:
        """A flow that nothing holds up."""
        wait = self.start(flow)
        assert wait.done, "the flow waits for somebody"
        return wait.result()

    def start(self, flow: Coroutine[Any, None, T]) -> Wait[T]:
        """A flow that may wait."""
        wait = self.flows.start(flow)
        self.flows.run_ready()
        return wait
