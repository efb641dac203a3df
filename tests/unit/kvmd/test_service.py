"""kvmd's files in this process: what a request may ask, what keeps a VM, and who may write tables."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from kvmd.config import Settings
from kvmd.core.host import CpuFeatures
from kvmd.service import fault_notes
from kvmd.service.door import Kvmd
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.kvm_run import ExitReason
from protocol.rpc.channel import Channel, Fds, Reply
from protocol.uapi import names
from protocol.units import GIB, MIB
from tests.unit.protocol.wires import Wires, failed, open_fds


class Client:
    """A process that talks to kvmd; `fds` are the files it holds."""

    def __init__(self, wire: Wires) -> None:
        self.wire = wire
        self.kvmd = Kvmd(wire.loop, Settings(GIB, MIB, CpuFeatures(), False, trust_importers=True))
        self.app = self.kvmd.app
        ours, theirs = socket.socketpair()
        self.kvmd.door.open(theirs)
        self.door = wire.channel(ours, "door")
        self.fds: dict[str, int] = {}

    def call(self, channel: Channel, op: str, fds: list[str] | None = None, **body: Any) -> Reply:
        wait = channel.call(op, body, [os.dup(self.fds[name]) for name in fds or []])
        self.wire.pump()
        return wait.result()

    def open(
        self, name: str, channel: Channel, op: str, fds: list[str] | None = None, **body: Any
    ) -> Channel:
        """A request whose reply is a file; the fd itself is the channel's."""
        fd = self.call(channel, op, fds, **body).fds.take(0)
        self.fds[name] = os.dup(fd)
        return self.wire.channel(socket.socket(fileno=fd), name)

    def close(self, name: str, channel: Channel) -> None:
        os.close(self.fds.pop(name))
        channel.close()
        self.wire.pump()


@pytest.fixture
def client() -> Iterator[Client]:
    wire = Wires()
    made = Client(wire)
    yield made
    for fd in made.fds.values():
        os.close(fd)
    made.kvmd.close()
    wire.pump()
    wire.close()
    assert wire.crashes == []


def machine(client: Client) -> dict[str, Channel]:
    """A process with 16 pages at gfn 0x100, one vCPU."""
    made = {"kvm": client.open("kvm", client.door, "OPEN", path="/dev/kvm")}
    made["mm"] = client.open("mm", client.door, "MM_CREATE")
    made["vm"] = client.open("vm", made["kvm"], "KVM_CREATE_VM", ["mm"], type=0)
    made["vcpu"] = client.open("vcpu", made["vm"], "KVM_CREATE_VCPU", vcpu_id=0)
    client.call(made["vcpu"], "KVM_SET_CPUID2", maxphyaddr=46)
    hva = client.call(made["mm"], "MMAP", size=16 * 4096).body["addr"]
    region: dict[str, Any] = {"slot": 0, "flags": 0, "guest_phys_addr": 0x10_0000, "memory_size": 0x1_0000}
    client.call(made["vm"], "KVM_SET_USER_MEMORY_REGION", **region, userspace_addr=hva)
    return made


def test_a_run_that_reads_more_than_a_reply_holds_is_einval(client: Client) -> None:
    vcpu = machine(client)["vcpu"]
    with pytest.raises(UapiError) as caught:
        client.call(vcpu, "KVM_RUN", program=[("r", 0x10_0000, 1 << 20)] * 5)
    assert caught.value.errno == errno.EINVAL
    assert client.call(vcpu, "KVM_RUN", program=[("r", 0x10_0000, 3)]).body["reads"] == [bytes(3)]


def test_a_polling_guest_holds_nobody_up_and_ends_with_its_fd(client: Client) -> None:
    """It would keep its VM for ever."""
    made = machine(client)
    run = made["vcpu"].call("KVM_RUN", {"program": [("spin_until_ne", 0x10_0000, 0)]})
    other = made["vm"].call("KVM_CREATE_VCPU", {"vcpu_id": 1})
    again = made["vcpu"].call("KVM_RUN", {"program": None})
    client.wire.loop.settle()
    for _ in range(10):  # `pump` would not come back
        client.wire.loop.turn(0)
    other.result().fds.close()
    busy = failed(again)
    assert isinstance(busy, UapiError)
    assert busy.errno == errno.EBUSY
    assert not run.done
    os.close(client.fds.pop("vcpu"))
    made["vcpu"].close()
    client.wire.pump()
    for name in ("vm", "mm"):
        client.close(name, made[name])
    assert list(client.app.vms) == []
    assert client.app.host.pool.in_use == 0


def test_a_polling_guest_sees_what_its_process_writes(client: Client) -> None:
    made = machine(client)
    hva = next(iter(next(iter(client.app.vms)).slots)).hva
    run = made["vcpu"].call("KVM_RUN", {"program": [("spin_until_ne", 0x10_0000, 0)]})
    store = made["mm"].call("WRITE", {"addr": hva, "data": b"x"})
    client.wire.pump()
    assert store.done
    assert run.result().body["done"] is True


def test_what_leaves_the_guest_is_told_field_by_field(client: Client) -> None:
    made = machine(client)
    vcpu = made["vcpu"]
    store = client.call(vcpu, "KVM_RUN", program=[("w", 0x66_6000, b"abc"), ("r", 0x66_6008, 4)]).body
    assert store == {
        "exit_reason": ExitReason.MMIO,
        "errno": 0,
        "why": "",
        "done": False,
        "finished": 0,
        "reads": [],
        "mmio": {"phys_addr": 0x66_6000, "len": 3, "is_write": True, "data": b"abc"},
    }
    load = client.call(vcpu, "KVM_RUN", program=None).body
    assert load["mmio"] == {"phys_addr": 0x66_6008, "len": 4, "is_write": False, "data": b""}
    end = client.call(vcpu, "KVM_RUN", program=None, mmio_data=b"wxyz").body
    assert (end["exit_reason"], end["done"], end["finished"]) == (ExitReason.IO, True, 2)
    assert end["reads"] == [b"wxyz"]
    client.call(made["mm"], "MUNMAP", addr=next(iter(next(iter(client.app.vms)).slots)).hva, size=4096)
    gone = client.call(vcpu, "KVM_RUN", program=[("r", 0x10_0000, 1)]).body
    assert (gone["exit_reason"], gone["errno"], gone["done"]) == (0, errno.EFAULT, False)
    assert gone["why"]


def test_msrs_and_write_tracking_are_reached_by_request(client: Client) -> None:
    made = machine(client)
    index = names.MSR_KVM_WALL_CLOCK_NEW
    assert client.call(made["vcpu"], "KVM_SET_MSRS", index=index, value=0x10_0000).body == {"ret": 1}
    assert client.call(made["vcpu"], "KVM_SET_MSRS", index=1, value=0).body == {"ret": 0}
    version = client.call(made["vcpu"], "KVM_RUN", program=[("r", 0x10_0000, 4)]).body["reads"]
    assert version == [b"\2\0\0\0"]
    client.call(made["vm"], "PAGE_TRACK_ADD", gpa=0x10_0000)
    client.call(made["vm"], "PAGE_TRACK_REMOVE", gpa=0x10_0000)
    with pytest.raises(UapiError) as caught:
        client.call(made["vm"], "PAGE_TRACK_REMOVE", gpa=0x10_0000)
    assert caught.value.errno == errno.EINVAL


def test_a_run_in_progress_keeps_its_vm(client: Client) -> None:
    """Its flow goes on when the host lets it; the tables must still be there."""
    made = machine(client)
    vm = next(iter(client.app.vms))
    gate: Wait[None] = Wait()

    class Slow:
        """Another VM of the process, whose importer is slow to ack."""

        async def invalidate_range_start(self, start: int, end: int) -> None:
            await gate

        def invalidate_range_end(self, start: int, end: int) -> None:
            pass

        async def clear_flush_young(self, start: int, end: int) -> bool:
            return False

    vm.mm.notifiers.append(Slow())
    hva = next(iter(vm.slots)).hva
    made["mm"].call("MADVISE", {"addr": hva, "size": 4096, "advice": "dontneed"})
    made["vcpu"].call("KVM_RUN", {"program": [("w", 0x10_0000, b"x")]})
    client.wire.pump()
    for name in ("vcpu", "vm"):
        client.close(name, made[name])
    assert list(client.app.vms) == [vm]
    gate.set(None)
    client.wire.pump()
    assert list(client.app.vms) == []
    assert client.app.host.pool.in_use == 0
    vm.mm.notifiers.clear()


def test_an_importer_gets_tables_it_can_only_read(client: Client) -> None:
    """I1: kvmd's mapping is the only one that stores."""
    made = machine(client)
    client.open("tdp", made["vm"], "KVM_CREATE_TDP_FD", as_id=0, mode=0, pad=0)
    importer = client.open("importer", client.door, "TDP_FD_GET", ["tdp"])
    reply = client.call(importer, "TDP_REGISTER_IMPORTER", name="unit")
    assert [kind for kind, *_ in reply.body["windows"]] == ["tables", "frames"]
    tables, fds = reply.body["windows"][0], reply.fds
    with pytest.raises(PermissionError):
        mmap.mmap(fds.peek(0), tables[2])
    with pytest.raises(PermissionError):
        os.pwrite(fds.peek(0), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fds.peek(0), 0)
    mmap.mmap(fds.peek(0), tables[2], prot=mmap.PROT_READ).close()
    fds.close()
    client.wire.pump()


@pytest.mark.rfc("RFC-19")
def test_a_tdp_fd_answers_no_request(client: Client) -> None:
    made = machine(client)
    tdp = client.open("tdp", made["vm"], "KVM_CREATE_TDP_FD", as_id=0, mode=0, pad=0)
    with pytest.raises(UapiError) as caught:
        client.call(tdp, "TDP_GET_METADATA")
    assert caught.value.errno == errno.ENODEV


def test_a_tdp_fd_keeps_the_vm_and_the_vm_fd_does_not_keep_the_tdp(client: Client) -> None:
    made = machine(client)
    made["tdp"] = client.open("tdp", made["vm"], "KVM_CREATE_TDP_FD", as_id=0, mode=0, pad=0)
    for name in ("vcpu", "vm", "mm"):
        client.close(name, made[name])
    assert len(client.app.vms) == 1
    client.close("tdp", made["tdp"])
    assert list(client.app.vms) == []
    assert client.app.host.frames.in_use == 0


def test_fds_on_an_ack_do_not_stay(client: Client) -> None:
    made = machine(client)
    client.open("tdp", made["vm"], "KVM_CREATE_TDP_FD", as_id=0, mode=0, pad=0)
    importer = client.open("importer", client.door, "TDP_FD_GET", ["tdp"])
    acked: list[int] = []

    def ack(channel: Channel, number: int, body: dict[str, Any], fds: Fds) -> None:
        acked.append(body["epoch"])
        channel.answer(number, {}, [os.memfd_create("x")])

    importer._on_request = ack
    held = client.call(importer, "TDP_REGISTER_IMPORTER", name="unit").fds
    gc.collect()
    before = len(open_fds())
    for _ in range(5):
        client.call(made["vcpu"], "KVM_RUN", program=[("w", 0x10_0000, b"x")])
        hva = next(iter(next(iter(client.app.vms)).slots)).hva
        client.call(made["mm"], "MADVISE", addr=hva, size=4096, advice="dontneed")
    assert acked == [1, 2, 3, 4, 5]
    assert len(open_fds()) == before
    held.close()
    client.wire.pump()


def errno_of(client: Client, channel: Channel, op: str, **fields: Any) -> int:
    with pytest.raises(UapiError) as caught:
        client.call(channel, op, **fields)
    return caught.value.errno


def test_a_request_that_a_vm_does_not_have_is_enotty_before_its_argument_is_read(client: Client) -> None:
    made = machine(client)
    fields = {"address": 0, "size": 4096, "attributes": 8, "argp": 1}
    assert errno_of(client, made["vm"], "KVM_SET_MEMORY_ATTRIBUTES", **fields) == errno.ENOTTY
    assert errno_of(client, made["vm"], "KVM_NO_SUCH_THING", argp=1) == errno.ENOTTY
    protected = client.open("protected", made["kvm"], "KVM_CREATE_VM", ["mm"], type=1)
    assert errno_of(client, protected, "KVM_SET_MEMORY_ATTRIBUTES", **fields) == errno.EFAULT


@pytest.mark.parametrize(
    ("cap", "device", "plain", "protected"),
    [
        pytest.param(3, 1, 1, 1, id="USER_MEMORY"),
        pytest.param(7, 1, 1, 1, id="EXT_CPUID"),
        pytest.param(9, 8, 8, 8, id="NR_VCPUS"),
        pytest.param(10, 32764, 32764, 32764, id="NR_MEMSLOTS"),
        pytest.param(16, 1, 1, 1, id="SYNC_MMU"),
        pytest.param(66, 1024, 1024, 1024, id="MAX_VCPUS"),
        pytest.param(81, 1, 1, 1, id="READONLY_MEM"),
        pytest.param(118, 2, 2, 1, id="MULTI_ADDRESS_SPACE"),
        pytest.param(128, 4096, 4096, 4096, id="MAX_VCPU_ID"),
        pytest.param(168, 3, 3, 3, id="MANUAL_DIRTY_LOG_PROTECT2"),
        pytest.param(192, 65536 * 16, 65536 * 16, 65536 * 16, id="DIRTY_LOG_RING"),
        pytest.param(233, 8, 0, 8, id="MEMORY_ATTRIBUTES"),
        pytest.param(235, 3, 3, 3, id="VM_TYPES"),
        pytest.param(244, 3, 3, 1, id="GUEST_MEMFD_FLAGS"),
        pytest.param(9999, 0, 0, 0, id="unknown"),
        pytest.param((1 << 64) - 1, 0, 0, 0, id="no number of any"),
    ],
)
def test_what_kvm_and_its_vms_say_they_can_do(
    client: Client, cap: int, device: int, plain: int, protected: int
) -> None:
    kvm = client.open("kvm", client.door, "OPEN", path="/dev/kvm")
    client.open("mm", client.door, "MM_CREATE")
    vms = [client.open(f"vm{n}", kvm, "KVM_CREATE_VM", ["mm"], type=n) for n in (0, 1)]
    asked = [client.call(channel, "KVM_CHECK_EXTENSION", cap=cap).body["ret"] for channel in (kvm, *vms)]
    assert asked == [device, plain, protected]


def test_a_hole_is_punched_into_a_guest_memfd_over_its_fd(client: Client) -> None:
    made = machine(client)
    memfd = client.open("memfd", made["vm"], "KVM_CREATE_GUEST_MEMFD", size=4 * 4096)
    assert client.call(memfd, "PUNCH_HOLE", offset=4096, size=8192).body == {}
    assert errno_of(client, memfd, "PUNCH_HOLE", offset=1, size=4096) == errno.EINVAL
    for op, fields in (("FTRUNCATE", {"size": 0}), ("PREAD", {"offset": 0, "size": 1})):
        assert errno_of(client, memfd, op, **fields) == errno.EINVAL
    assert errno_of(client, memfd, "PWRITE", offset=0, data=b"x") == errno.EINVAL


def test_the_kernels_own_sources_of_invalidation_are_requests_of_a_vm(client: Client) -> None:
    vm = machine(client)["vm"]
    client.call(vm, "NX_HUGE_PAGES", on=True)
    assert client.call(vm, "RECOVER_NX_HUGE_PAGES").body == {"ret": 0}
    client.call(vm, "ZAP_GFN_RANGE", gpa=0x10_0000, size=4096)
    for gpa, size in ((1, 4096), (0, 0), (0, 1), (1 << 63, 4096)):
        assert errno_of(client, vm, "ZAP_GFN_RANGE", gpa=gpa, size=size) == errno.EINVAL


def test_a_reader_of_notes_that_does_not_read_loses_notes_and_holds_nobody_up(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_notes, "MAX_UNREAD_BYTES", 512)
    made = machine(client)
    client.fds["notes"] = client.call(client.door, "KVM_FAULT_NOTES_GET", ["vm"]).fds.take(0)  # never read
    hva = next(iter(next(iter(client.app.vms)).slots)).hva
    for _ in range(1000):
        client.call(made["vcpu"], "KVM_RUN", program=[("w", 0x10_0000 + n * 4096, b"x") for n in range(16)])
        client.call(made["mm"], "MADVISE", addr=hva, size=16 * 4096, advice="dontneed")
        stats = client.call(client.door, "STATS", ["vm"]).body["vms"][0]
        if stats["notes_dropped"] > 16:
            break
    assert stats["notes_dropped"] > 16
    assert stats["notes"] + stats["notes_dropped"] == stats["pf_fixed"]
    os.close(client.fds.pop("notes"))
    client.wire.pump()
    client.call(made["vcpu"], "KVM_RUN", program=[("w", 0x10_0000, b"x")])
    after = client.call(client.door, "STATS", ["vm"]).body["vms"][0]
    assert (after["notes"], after["notes_dropped"]) == (stats["notes"], stats["notes_dropped"])
