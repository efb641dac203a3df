"""cpio's newc format, as the kernel reads an initramfs (early-userspace/buffer-format.rst).

Nothing of the machine or the hour is in it: owner 0, time 0, inode numbers in the order of names, so the same
entries are the same bytes.  Every directory on the way to an entry is made.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_WORD: Final = 4  # names and contents are padded to it


@dataclass(frozen=True)
class CpioEntry:
    """`mode` with the type's bits; `device` is (major, minor) of a node."""

    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def executable(content: bytes) -> CpioEntry:
    return CpioEntry(stat.S_IFREG | 0o755, content)


def plain_file(content: bytes) -> CpioEntry:
    return CpioEntry(stat.S_IFREG | 0o644, content)


def directory() -> CpioEntry:
    return CpioEntry(stat.S_IFDIR | 0o755)


def character_device(major: int, minor: int) -> CpioEntry:
    return CpioEntry(stat.S_IFCHR | 0o600, device=(major, minor))


def newc(entries: Mapping[str, CpioEntry]) -> bytes:
    """`entries` by path without a leading slash."""
    whole = dict(entries)
    for name in entries:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name == _TRAILER:
            raise ValueError(f"no name for an initramfs: {name!r}")
        for parent in path.parents[:-1]:
            if not stat.S_ISDIR(whole.setdefault(str(parent), directory()).mode):
                raise ValueError(f"{str(parent)!r} is no directory, and holds {name!r}")
    records = [_record(number, name, whole[name]) for number, name in enumerate(sorted(whole), start=1)]
    return b"".join([*records, _record(0, _TRAILER, CpioEntry(0))])


def _record(inode: int, name: str, entry: CpioEntry) -> bytes:
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    text = name.encode() + b"\0"
    owner = time = home = checksum = 0
    words = (inode, entry.mode, owner, owner, links, time, len(entry.content), home, home, *entry.device)
    header = _MAGIC + b"".join(b"%08x" % word for word in (*words, len(text), checksum))
    return _padded(header + text) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _WORD)
