"""How a TDP FD becomes an fd: made whole, published last, and undone once when there is no room for it."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmd.core.vm import Kvm
from kvmd.service.objects import TdpFile, VmFile
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.rpc.channel import Channel, Reply
from protocol.rpc.files import Files
from tests.planted.plugin import Plants
from tests.unit.kvmd.test_service import Client, machine
from tests.unit.protocol.wires import Wires, open_fds

GOOD: dict[str, Any] = {"as_id": 0, "mode": 0, "pad": 0}


@pytest.fixture
def client() -> Iterator[Client]:
    wire = Wires()
    made = Client(wire)
    yield made
    made.kvmd.close()
    wire.pump()
    wire.close()


class Ready:
    """A VM whose vCPU runs already, so that its root is there to be lent."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.files = machine(client)
        client.call(self.files["vcpu"], "KVM_RUN", program=[("w", 0x10_0000, b"x")])
        self.vm: Kvm = next(iter(client.app.vms))
        self.owner = client.app.files.find(client.fds["vm"], VmFile)

    def counts(self) -> tuple[object, ...]:
        self.client.wire.pump()
        gc.collect()  # fds of earlier tests are not ours to count
        roots = [(root.hpa, root.refs, root.exported) for root in self.vm.mmu.roots]
        return (
            self.owner.users.count,
            len(self.client.app.files),
            open_fds(),
            roots,
            dict(self.vm.exports.tdps),
        )

    def create(self, **body: object) -> Wait[Reply]:
        return self.files["vm"].call("KVM_CREATE_TDP_FD", GOOD | body)

    def close_files(self) -> None:
        for name, channel in self.files.items():
            self.client.close(name, channel)


@pytest.fixture
def ready(client: Client) -> Iterator[Ready]:
    made = Ready(client)
    yield made
    made.close_files()


def no_room(*_: object) -> None:
    raise OSError(errno.EMFILE, "no more")


def full_fd_table(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE, once, everything as before; and with room again it works."""
    before = ready.counts()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", no_room)
        refused = ready.create()
        ready.client.wire.pump()
    with pytest.raises(UapiError) as caught:
        refused.result()
    assert errno.errorcode[caught.value.errno] == "EMFILE"
    assert ready.counts() == before
    assert ready.client.wire.crashes == []
    made = ready.create()
    ready.client.wire.pump()
    made.result().fds.close()
    assert ready.counts() == before


@pytest.mark.rfc("RFC-17", "RFC-20")
@pytest.mark.defect("B-03", "B-04")
def test_a_create_without_room_for_an_fd_is_emfile_and_undone_once(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_fd_table(ready, monkeypatch)


def takes_an_error_for_a_file(self: Files, service: Any, obj: Any, on_release: Any = None) -> Any:
    """B-03: the test for null lets the error pointer pass."""
    return (-errno.EMFILE, 0, None)


def reports_success_and_undoes_twice(self: Files, service: Any, obj: Any, on_release: Any = None) -> Any:
    """B-04."""
    on_release(obj)
    on_release(obj)
    return (os.eventfd(0), 0, None)


@pytest.mark.defect("B-03", "B-04")
@pytest.mark.parametrize("bug", [takes_an_error_for_a_file, reports_success_and_undoes_twice])
def test_a_failure_that_is_not_passed_on_or_undone_twice_is_noticed(
    client: Client, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Ready(client)
    monkeypatch.setattr(Files, "open", bug)
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
        full_fd_table(ready, monkeypatch)


# -- published last --------------------------------------------------------------------------------------


def whole_when_published(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment its fd exists, another thread may use the TDP, or close it."""
    published: list[TdpFile] = []
    refs = ready.owner.users.count
    opened = Files.open

    def watched(self: Files, service: Any, obj: Any, on_release: Any = None) -> tuple[int, int, Channel]:
        if isinstance(obj, TdpFile):
            published.append(obj)
            assert ready.vm.exports.tdps == {0: obj.tdp.exported}, "published before it is listed"
            assert obj.tdp.exported.root.exported
            assert ready.owner.users.count > refs, "published before it holds its VM"
        return opened(self, service, obj, on_release)

    monkeypatch.setattr(Files, "open", watched)
    made = ready.create()
    ready.client.wire.pump()
    assert ready.client.wire.crashes == []
    made.result().fds.close()
    assert len(published) == 1
    ready.client.wire.pump()
    assert ready.vm.exports.tdps == {}


@pytest.mark.rfc("RFC-01")
@pytest.mark.defect("B-05")
def test_a_tdp_fd_is_whole_when_it_is_published(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_when_published(ready, monkeypatch)


@pytest.mark.defect("B-05")
def test_a_tdp_fd_published_half_made_is_noticed(
    client: Client, monkeypatch: pytest.MonkeyPatch, plant: Plants
) -> None:
    """As in the series: the fd is installed first, the list is written after it."""
    ready = Ready(client)
    plant("B-05-published-half-made")
    with pytest.raises(AssertionError, match="KVM_CREATE_TDP_FD"):
        whole_when_published(ready, monkeypatch)


@pytest.mark.rfc("RFC-16")
@pytest.mark.defect("B-02")
@pytest.mark.parametrize("copies", [2, 5])
def test_of_creates_that_arrive_together_one_wins(ready: Ready, copies: int) -> None:
    waits = [ready.create() for _ in range(copies)]
    ready.client.wire.pump()
    refusals = []
    for wait in waits:
        try:
            wait.result().fds.close()
        except UapiError as error:
            refusals.append(error.errno)
    assert refusals == [errno.EEXIST] * (copies - 1)


# -- what the other refusals are over the wire -----------------------------------------------------------


@pytest.mark.rfc("RFC-18")
@pytest.mark.defect("B-06")
def test_an_unwritable_result_is_efault_and_leaves_nothing(ready: Ready) -> None:
    before = ready.counts()
    mm = ready.files["mm"]
    read_only = ready.client.call(mm, "MMAP", size=4096, prot="r").body["addr"]
    for argp in (read_only, 0, read_only + 4096 - 8, (1 << 64) - 8):
        refused = ready.create(argp=argp)
        ready.client.wire.pump()
        with pytest.raises(UapiError) as caught:
            refused.result()
        assert caught.value.errno == errno.EFAULT
        assert ready.counts() == before
    writable = ready.client.call(mm, "MMAP", size=4096).body["addr"]
    made = ready.create(argp=writable)
    ready.client.wire.pump()
    made.result().fds.close()


@pytest.mark.rfc("RFC-11")
@pytest.mark.defect("B-27")
def test_non_coherent_dma_is_registered_with_the_vm(ready: Ready) -> None:
    client, vm = ready.client, ready.files["vm"]

    def errno_of(op: str, **body: object) -> int:
        wait = vm.call(op, body)
        client.wire.pump()
        try:
            wait.result().fds.close()
        except UapiError as error:
            return error.errno
        return 0

    assert errno_of("KVM_UNREGISTER_NONCOHERENT_DMA") == errno.EINVAL
    assert errno_of("KVM_REGISTER_NONCOHERENT_DMA") == 0
    assert errno_of("KVM_CREATE_TDP_FD", **GOOD) == errno.EINVAL
    assert errno_of("KVM_UNREGISTER_NONCOHERENT_DMA") == 0
    tdp = client.open("tdp", vm, "KVM_CREATE_TDP_FD", **GOOD)
    assert errno_of("KVM_REGISTER_NONCOHERENT_DMA") == errno.EBUSY
    client.close("tdp", tdp)
    assert errno_of("KVM_REGISTER_NONCOHERENT_DMA") == 0
