"""Requests that fail: with which errno; and those a test lets fail, with these errnos and no others.

A rig that swallows every UapiError hides the one that should not have come, and that nothing ever succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import errorcode

import pytest

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


@contextmanager
def refused(number: int, why: str = "") -> Iterator[None]:
    """What is within must end in that errno, and say that."""
    with pytest.raises(UapiError) as caught:
        yield
    assert errorcode[caught.value.errno] == errorcode[number], caught.value
    assert why in caught.value.why


def errno_of(act: Callable[[], object]) -> int:
    """It must be refused."""
    with pytest.raises(UapiError) as caught:
        act()
    return caught.value.errno
