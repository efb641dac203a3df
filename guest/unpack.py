"""A package's files into a directory, and nowhere else.

dpkg-deb reads the package; what its archive names is checked here: names and links stay inside, nothing is
written through a link that leaves, no devices, no owners, no set-user-id.  A link to an absolute path means
the directory's own, as it would after a chroot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

from guest.failure import GuestError


def unpack(deb: Path, into: Path) -> None:
    root = into.resolve()
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        try:
            with tarfile.open(fileobj=reader.stdout, mode="r|") as archive:
                for member in archive:
                    _extract(archive, member, root)
        except (tarfile.TarError, OSError, GuestError) as error:
            reader.kill()
            said = reader.stderr.read().decode(errors="replace").strip()
            raise GuestError(f"{deb.name} cannot be unpacked: {said or error}") from error
        reader.stdout.read()  # the padding
        said = reader.stderr.read().decode(errors="replace").strip()
    if reader.returncode:
        raise GuestError(f"{deb.name} cannot be unpacked: {said}")


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    path = _inside(root, PurePosixPath(member.name))
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    if path == root:
        raise GuestError(f"{member.name!r} names the directory itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if member.isfile():
        source = archive.extractfile(member)
        assert source is not None
        _write(path, source, 0o755 if member.mode & 0o111 else 0o644)
    elif member.issym():
        path.symlink_to(_target(root, path, PurePosixPath(member.linkname)))
    elif member.islnk():
        os.link(_inside(root, PurePosixPath(member.linkname)), path, follow_symlinks=False)
    else:
        raise GuestError(f"{member.name!r} is neither file, directory nor link")


def _write(path: Path, source: IO[bytes], mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "wb") as file:
        shutil.copyfileobj(source, file)


def _inside(root: Path, name: PurePosixPath) -> Path:
    """Where a member is put; the directory it is in, links followed, has to be below `root`."""
    if name.is_absolute() or ".." in name.parts:
        raise GuestError(f"{str(name)!r} leaves the directory")
    path = root / name
    if path != root and not (path.parent.resolve() / "x").is_relative_to(root):
        raise GuestError(f"{str(name)!r} leaves the directory through a link")
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise GuestError(f"{str(name)!r} leaves the directory through a link")
    return path


def _target(root: Path, path: Path, target: PurePosixPath) -> str:
    """What a link is made to say, relative to where it is."""
    here = path.parent.resolve()
    goal = Path(os.path.normpath(root / target.relative_to("/") if target.is_absolute() else here / target))
    if not goal.is_relative_to(root):
        raise GuestError(f"the link {str(path.relative_to(root))!r} to {str(target)!r} leaves the directory")
    return os.path.relpath(goal, here)
