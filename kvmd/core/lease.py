"""What an importer is lent, as long as it lasts.

A reference on another process's behalf (docs/decisions/0004): it ends when every copy of its fd is closed,
wherever that is, and until then something may walk what was lent with it.  Whoever frees anything behind a
walker waits for the end of its lease first (I13).
"""

from __future__ import annotations

from typing import Protocol

from protocol.flow import Wait


class Lease(Protocol):
    @property
    def ended(self) -> Wait[None]: ...
