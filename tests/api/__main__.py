"""`python -m tests.api`: whether the front door is as it was; `--write` takes it as it is."""

from __future__ import annotations

import sys

from tests.api.page import DOCUMENT, SIGNATURES, document, signatures


def main() -> int:
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document(), encoding="utf-8")
        SIGNATURES.write_text(signatures(), encoding="utf-8")
    same = SIGNATURES.read_text(encoding="utf-8") == signatures()
    print("as it was" if same else f"other names or signatures than in {SIGNATURES}")
    return not same


sys.exit(main())
