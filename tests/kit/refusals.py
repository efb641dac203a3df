"""Requests that a test lets fail: with these errnos and no others.

A rig that swallows every UapiError hides the one that should not have come, and that nothing ever succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import errorcode

from protocol.errors import UapiError


@contextmanager
def may_refuse(*errnos: int) -> Iterator[None]:
    """What is within may end early with one of `errnos`; any other is a failure of the test."""
    try:
        yield
    except UapiError as error:
        if error.errno not in errnos:
            wanted = ", ".join(errorcode[number] for number in errnos)
            raise AssertionError(f"refused with {error}, and not with {wanted}") from error
