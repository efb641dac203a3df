"""x"""

from pathlib import Path

from qemu_shim.compare.schema import Comparison


def write_documents(comparison: Comparison, directory: Path) -> None: ...
