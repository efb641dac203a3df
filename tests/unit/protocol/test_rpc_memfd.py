"""What may be mapped of a peer's memory: nothing that could shrink, whatever it is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from protocol.kernel.linux import LINUX

SIZE = 1 << 16


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL]
)
def test_a_memfd_that_could_shrink_is_refused(memfd: int, seals: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ValueError, match="F_SEAL_SHRINK"):
        LINUX.map_peer(memfd, SIZE, writable=False)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc/self/exe", "/"])
def test_what_is_no_memfd_is_refused(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ValueError, match="no memfd"):
        LINUX.map_peer(fd, SIZE, writable=False)
    os.close(fd)


def test_a_sealed_one_is_mapped_as_far_as_it_goes_and_stays_so(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(ValueError, match="larger than its file"):
        LINUX.map_peer(memfd, SIZE + 1, writable=True)
    memory = LINUX.map_peer(memfd, SIZE, writable=True)
    memory.view[SIZE - 4 :] = b"last"
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, SIZE - 1)
    assert os.pread(memfd, 4, SIZE - 4) == b"last"
    memory.close()


def test_what_is_only_read_cannot_be_written(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memory = LINUX.map_peer(memfd, SIZE, writable=False)
    with pytest.raises(TypeError):
        memory.view[0] = 1
    memory.close()
