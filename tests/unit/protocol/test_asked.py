"""An error of the kernel's says what was asked, what stood in the way and what to do; its errno stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from protocol.kernel.asked import TO_DO, asked, refusal, told
from protocol.kernel.linux import LINUX
from tests.torture.calls import ERRNOS


@pytest.mark.parametrize("number", sorted({number for errnos in ERRNOS.values() for number in errnos}))
def test_what_a_call_may_fail_with_says_what_to_do_and_stays_of_its_class(number: int) -> None:
    bare = OSError(number, os.strerror(number))
    with pytest.raises(type(bare), match="cannot do it: ") as caught, asked("cannot do it", "/there"):
        raise bare
    assert (caught.value.errno, caught.value.filename) == (number, "/there")
    # What is left ends a connection, which says so itself [channel.py].
    hung_up = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ETOOMANYREFS}
    assert TO_DO.get(number, "") in str(caught.value)
    assert number in TO_DO or number in hung_up


def test_a_refusal_has_the_errno_and_the_whole_story() -> None:
    refused = refusal(told(OSError(errno.EMFILE, "none left"), "cannot copy an fd"), "no file for a new VM")
    assert str(refused) == (
        "[EMFILE] no file for a new VM: cannot copy an fd: none left; "
        "raise this process's limit of open files (ulimit -n)"
    )


ASKED: dict[str, Any] = {
    "dup": lambda: LINUX.dup(-1),
    "socket_of": lambda: LINUX.socket_of(0x7FFF),
    "connect": lambda: LINUX.connect(Path("/no/such/name")),
    "listen": lambda: LINUX.listen(Path("/no/such/directory/name"), None),
    "listen on a file": lambda: LINUX.listen(Path(__file__), None),
    "memory_of": lambda: LINUX.memory_of(0x7FFF),
    "contents": lambda: LINUX.contents(0x7FFF),
    "memfd": lambda: LINUX.memfd("huge", 1 << 62, peer_writes=False),
}


@pytest.mark.parametrize("call", ASKED)
def test_no_call_of_the_port_tells_an_errno_alone(call: str) -> None:
    with pytest.raises(OSError, match=r"\[Errno \d+\] cannot ") as caught:
        ASKED[call]()
    assert os.strerror(caught.value.errno or 0) in str(caught.value) or "no socket" in str(caught.value)


def test_who_cannot_listen_makes_the_directory_and_who_cannot_connect_starts_a_listener() -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot listen: .*; make the directory it is to lie in"):
        ASKED["listen"]()
    with pytest.raises(FileNotFoundError, match=r"cannot connect: .*; start who is to listen there"):
        ASKED["connect"]()


def test_a_directory_of_a_peers_is_not_read_and_closed() -> None:
    fd = os.open("/", os.O_RDONLY)
    with pytest.raises(OSError, match="no file, and who reads it may wait for ever"):
        LINUX.contents(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
