"""What a person is told, in a sentence and without a traceback."""

from __future__ import annotations


class GuestError(Exception):
    """A step that did not work: what was asked for, and what stood in the way."""
