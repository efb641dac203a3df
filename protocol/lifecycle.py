"""A life cycle: what state something is in, what may happen to it there, and what that makes of it.

A table of transitions instead of booleans side by side: what is not in it cannot happen, and says so where it
is tried.  Whoever keeps the table asserts what itself promises; what others send is asked of `permits` first
and refused with an errno.  docs/lifecycles.md is drawn from the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class LifeCycle(Generic[State, Event]):
    """`born` is the state of a new one; a state that no event leaves is the end."""

    def __init__(self, name: str, born: State, transitions: Mapping[tuple[State, Event], State]) -> None:
        self.name = name
        self.born = born
        self.transitions = dict(transitions)

    def permits(self, state: State, event: Event) -> bool:
        return (state, event) in self.transitions

    def after(self, state: State, event: Event) -> State:
        """The state that `event` leads to."""
        assert self.permits(state, event), f"{self.name}: {event.name} happened to one that is {state.name}"
        return self.transitions[state, event]
