"""What a guest is made of, kept between runs: packages, what is in them, what was built of that.

    debs/NAME.deb            as fetched
    emulator.json, kernel.json   what the signed index had, when it was asked: versions, sizes, sha256
    emulator-HASH/, kernel-HASH/ unpacked, of just these packages
    image-HASH.cpio          the initramfs, of just these inputs

A file or directory appears under its name when it is whole, so what was interrupted is done again.  One
process at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from guest.archive import DebArchive, DebFile, is_whole, machine_mirror
from guest.build import SOURCES, built
from guest.failure import GuestError
from guest.image import INIT, initramfs
from guest.kernel import DebianKernel
from guest.unpack import unpack
from guest.wanted import EMULATOR, KERNEL, WANTS, Want

CACHE_VARIABLE: Final = "GUEST_CACHE"
_NAME_BYTES: Final = 8


def default_cache() -> Path:
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdp-share" / "guest"


def digest(parts: Sequence[bytes]) -> str:
    """Of what something is made from, in this order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[: 2 * _NAME_BYTES]


@dataclass(frozen=True)
class Told:
    """What the signed index had for one want."""

    want: Want
    mirror: str
    debs: tuple[DebFile, ...]

    @property
    def identity(self) -> str:
        return digest([deb.sha256.encode() for deb in self.debs])

    @property
    def size(self) -> int:
        return sum(deb.size for deb in self.debs)


class GuestStore:
    def __init__(self, directory: Path, *, mirror: str, keyring: Path) -> None:
        """`mirror`: the archive, or nothing for the one that apt on this machine is set up for."""
        self._at, self._mirror, self._keyring = directory.absolute(), mirror, keyring

    @contextmanager
    def alone(self) -> Iterator[GuestStore]:
        try:
            self._at.mkdir(parents=True, exist_ok=True)
            lock = (self._at / "lock").open("w")
        except OSError as error:
            raise GuestError(
                f"no place for the guest's files: {error} ({CACHE_VARIABLE} names another)"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for who else is at {self._at}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield self

    def planned(self, want: Want, mirror: str) -> Told:
        """Asks the archive, fetches nothing but its index."""
        return Told(want, mirror, tuple(self._archive(want, mirror).plan()))

    def fetch(self, told: Told) -> None:
        self._archive(told.want, told.mirror).fetch(told.debs)
        record = {"mirror": told.mirror, "debs": [asdict(deb) for deb in told.debs]}
        self._write(self._at / f"{told.want.name}.json", (json.dumps(record, indent=2) + "\n").encode())
        used = {deb.file for want in (told.want, *WANTS) for deb in self._recorded(want).debs}
        for old in (self._at / "debs").glob("*.deb"):
            if old.name not in used:
                old.unlink()

    def known(self, want: Want) -> Told | None:
        """What was fetched before, if it is all there and whole."""
        told = self._recorded(want)
        return told if told.debs and all(is_whole(deb, self._at / "debs") for deb in told.debs) else None

    def _recorded(self, want: Want) -> Told:
        """Of no packages, if there is no record that can be read."""
        try:
            record = json.loads((self._at / f"{want.name}.json").read_bytes())
            return Told(want, record["mirror"], tuple(DebFile(**deb) for deb in record["debs"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Told(want, "", ())

    def unpacked(self, want: Want) -> Path:
        """The packages of the last fetch; fetched now if there was none."""
        told = self.known(want)
        if told is None:
            told = self.planned(want, self._mirror or machine_mirror())
            self.fetch(told)
        place = self._at / f"{want.name}-{told.identity}"
        if not place.is_dir():
            print(f"{want.name}: unpacking {len(told.debs)} packages", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=self._at, prefix="unpacking-") as room:
                whole = Path(room) / "whole"
                whole.mkdir()
                for deb in told.debs:
                    unpack(self._at / "debs" / deb.file, whole)
                whole.rename(place)
            self._forget(f"{want.name}-*", place)
        return place

    def emulator(self) -> Path:
        return self.unpacked(EMULATOR)

    def kernel(self) -> DebianKernel:
        return DebianKernel.found_in(self.unpacked(KERNEL))

    def image(self, kernel: DebianKernel) -> Path:
        """The initramfs for this kernel and our sources as they are now."""
        ours = [INIT, *sorted(SOURCES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))]
        identity = digest([kernel.root.name.encode(), *(path.read_bytes() for path in ours)])
        place = self._at / f"image-{identity}.cpio"
        if not place.is_file():
            print(f"guest: building modules and image for {kernel.version}", file=sys.stderr)
            self._write(place, initramfs(kernel.busybox.read_bytes(), built(kernel), kernel.module))
            self._forget("image-*.cpio", place)
        return place

    def _archive(self, want: Want, mirror: str) -> DebArchive:
        root = self._at / "apt" / want.name
        return DebArchive(want, root, self._at / "debs", mirror=mirror, keyring=self._keyring)

    def _write(self, path: Path, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self._at, prefix="writing-") as file:
            file.write(data)
            file.flush()
            path.unlink(missing_ok=True)
            os.link(file.name, path)

    def _forget(self, pattern: str, kept: Path) -> None:
        """What was made of other packages or sources: it can be made again."""
        for old in self._at.glob(pattern):
            if old != kept:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
