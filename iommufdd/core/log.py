"""What an administrator is told of, as a port: a core writes no log itself.

Each call is an event and its values.  Nothing depends on whether anybody reads it.
Models dev_warn and pr_err of the drivers; structlog's logger has these methods.
"""

from __future__ import annotations

from typing import Any, Protocol


class Log(Protocol):
    def info(self, event: str, **values: Any) -> Any: ...
    def warning(self, event: str, **values: Any) -> Any: ...
    def error(self, event: str, **values: Any) -> Any: ...
