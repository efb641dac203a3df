"""kvmd with a planted bug: a flush tells the importers and does not wait for their acks."""

from __future__ import annotations

import sys

from kvmd.__main__ import main
from kvmd.importers import RemoteImporter
from protocol.flow import Wait, done


def _tell_only(self: RemoteImporter, start: int, size: int, number: int) -> Wait[None]:
    self._tell(start, size, number)
    return done(None)


if __name__ == "__main__":
    RemoteImporter.invalidate = _tell_only  # type: ignore[method-assign]
    sys.exit(main())
