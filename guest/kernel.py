"""Debian's kernel as it was unpacked: its version, its image, and its modules in the order they load.

A package has no modules.dep, which is made where it is installed; what that is made from, the names that a
module was linked against, is in the module itself.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from guest.failure import GuestError

_DEPENDS: Final = re.compile(rb"(?<=\0)depends=([\w,-]*)(?=\0)")
_VERSION: Final = re.compile(rb"(?<=\0)vermagic=(\S+) ")


def module_name(file: str) -> str:
    """As the kernel has it: of files one is written with dashes, and of them no two differ in that alone."""
    return file.partition(".ko")[0].replace("-", "_")


def depends_of(module: bytes) -> tuple[str, ...]:
    """What it says in .modinfo."""
    match = _DEPENDS.search(module)
    if match is None:
        raise GuestError("a file that should be a kernel module does not say what it depends on")
    return tuple(module_name(name) for name in match[1].decode().split(",") if name)


def version_of(module: bytes) -> str:
    """The kernel it was built for."""
    match = _VERSION.search(module)
    return match[1].decode() if match else ""


def load_order(wanted: Iterable[str], read: Callable[[str], bytes]) -> list[str]:
    """`wanted` in the order given, each after what it needs; `read` has the module of a name."""
    order: list[str] = []

    def put(name: str, on_the_way: tuple[str, ...]) -> None:
        if name in on_the_way:
            raise GuestError(f"modules that need each other: {', '.join(on_the_way)}")
        if name in order:
            return
        for needed in depends_of(read(name)):
            put(needed, (*on_the_way, name))
        order.append(name)

    for name in wanted:
        put(name, ())
    return order


@dataclass(frozen=True)
class DebianKernel:
    """`root` has boot/, lib/ and usr/ of the image's and the headers' packages."""

    root: Path
    version: str

    @classmethod
    def found_in(cls, root: Path) -> DebianKernel:
        images = sorted((root / "boot").glob("vmlinuz-*"))
        if len(images) != 1:
            raise GuestError(f"{len(images)} kernels in {root}, where one is wanted")
        return cls(root, images[0].name.removeprefix("vmlinuz-"))

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.version}"

    @property
    def busybox(self) -> Path:
        return next(
            path for path in (self.root / "bin/busybox", self.root / "usr/bin/busybox") if path.exists()
        )

    @cached_property
    def _modules(self) -> dict[str, Path]:
        """By name."""
        places = (self.root / prefix / "lib/modules" / self.version for prefix in ("", "usr"))
        return {module_name(path.name): path for place in places for path in place.rglob("*.ko*")}

    def module(self, name: str) -> bytes:
        """As it is loaded: without compression."""
        path = self._modules.get(name)
        if path is None:
            raise GuestError(f"kernel {self.version} has no module {name}")
        if path.suffix not in (".ko", ".xz"):
            raise GuestError(f"{path.name} is compressed in a way that is not known here")
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()

    @property
    def headers(self) -> Path:
        return self.root / "usr/src" / f"linux-headers-{self.version}"

    @property
    def common_headers(self) -> Path:
        abi, _, _ = self.version.rpartition("-")
        return self.root / "usr/src" / f"linux-headers-{abi}-common"
