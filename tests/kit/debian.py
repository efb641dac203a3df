"""A made-up archive of Debian's in a directory: packages, indexes, a Release signed by its own key."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("apt-get", "gpg", "dpkg-deb")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]


class SigningKey:
    """Without a passphrase, in a home of its own; `close` ends the agent that gpg starts for it."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self._gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback"]
        self._home = home
        self.keyring = home / "public.gpg"
        self._run(
            "--passphrase", "", "--quick-generate-key", "Nobody <nobody@example.org>", "ed25519", "sign"
        )
        self.keyring.write_bytes(self._run("--export"))

    def sign(self, text: str) -> bytes:
        return self._run("--clearsign", given=text.encode())

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self._home), "--kill", "all"], check=True)

    def _run(self, *arguments: str, given: bytes = b"") -> bytes:
        return subprocess.run([*self._gpg, *arguments], input=given, capture_output=True, check=True).stdout


def entry(
    name: str, content: bytes = b"", *, mode: int = 0o644, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    """One member; `fields` as of TarInfo, `type` and `linkname` for what is no file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archived(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


def deb(control: str, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """deb(5): three files in an ar(5) archive."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": archived([entry("./control", control.encode())]),
        "data.tar.gz": archived(members),
    }
    found = b"!<arch>\n"
    for name, data in parts.items():
        found += (
            f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    return found


@dataclass(frozen=True)
class MadeUp:
    """A package to be; `files` by path."""

    name: str
    version: str
    depends: str = ""
    files: Mapping[str, bytes] | None = None

    @property
    def file(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"

    @property
    def control(self) -> str:
        depends = f"Depends: {self.depends}\n" * bool(self.depends)
        return (
            f"Package: {self.name}\nVersion: {self.version}\nArchitecture: all\nMaintainer: nobody\n"
            f"{depends}Description: made up\n"
        )

    def data(self) -> bytes:
        return deb(self.control, [entry(f"./{path}", data) for path, data in (self.files or {}).items()])


class MadeUpArchive:
    """`uri` is what apt is told; a suite is written by `publish`."""

    def __init__(self, directory: Path, key: SigningKey) -> None:
        self.root, self._key = directory, key
        self.uri = f"copy:{directory}"

    def path(self, package: MadeUp) -> Path:
        return self.root / "pool" / package.file.replace("%3a", ":")

    def publish(self, suite: str, packages: Sequence[MadeUp], *, signer: SigningKey | None = None) -> None:
        stanzas = []
        for package in packages:
            data, path = package.data(), self.path(package)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            stanzas.append(
                f"{package.control}Filename: pool/{path.name}\nSize: {len(data)}\n"
                f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
            )
        index = "\n".join(stanzas).encode()
        place = self.dist(suite) / "main/binary-amd64/Packages"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(index)
        release = (
            f"Origin: Debian\nSuite: {suite}\nCodename: {suite}\nArchitectures: amd64\nComponents: main\n"
            f"Date: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n"
            f" {hashlib.sha256(index).hexdigest()} {len(index)} main/binary-amd64/Packages\n"
        )
        (self.dist(suite) / "InRelease").write_bytes((signer or self._key).sign(release))

    def dist(self, suite: str) -> Path:
        return self.root / "dists" / suite
