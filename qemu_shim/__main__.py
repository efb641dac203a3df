"""`qemu-shim`: the front door for people."""

from __future__ import annotations

import sys

from qemu_shim.cli import main

if __name__ == "__main__":
    sys.exit(main())
