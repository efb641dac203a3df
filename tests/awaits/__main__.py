"""`python -m tests.awaits`: what is not said beside an await; `--write` makes docs/awaits.md of what is."""

from __future__ import annotations

import sys

from tests.awaits.page import DOCUMENT, complaints, document


def main() -> int:
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document(), encoding="utf-8")
    found = complaints()
    print("\n".join([*found, f"{len(found)} complaints"]))
    return bool(found)


sys.exit(main())
