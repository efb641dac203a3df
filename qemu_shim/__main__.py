"""`qemu-shim`: the front door for people."""

from __future__ import annotations

import signal
import sys

from qemu_shim.commands import COMMANDS, parsers


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not COMMANDS.keys() & words[:1]:
        parsers()[0].parse_args(words)  # it says what there is, or what is wrong
    try:
        from qemu_shim.cli import main as cli  # `--help` waits for none of it

        return cli(words)
    except KeyboardInterrupt:  # while that is imported, or where no command waits for one
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT  # vmm/interrupt.py may be what was being imported


if __name__ == "__main__":
    sys.exit(main())
