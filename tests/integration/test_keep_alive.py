"""Nothing keeps itself alive: what a client sends along ends with the client."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.integration.attacks import close_all
from tests.integration.plain import REQUEST, Plain, frame
from tests.integration.test_hostile import a_vm, keep
from tests.kit.daemons import TRUSTING, System, system, until

NO_SLOT = {"slot": 0, "flags": 0, "guest_phys_addr": 0, "memory_size": 0, "userspace_addr": 0}


@pytest.fixture(scope="module")
def kvmd() -> Iterator[System]:
    with system(TRUSTING, None, "kvmd") as running:
        yield running


def wait_empty(running: System) -> None:
    door = Plain.connect(running.socket("kvmd"))

    def empty() -> bool:
        stats, _ = door.ask("STATS")
        return not (stats["vm_count"] or stats["processes"] or stats["frames"] or stats["table_pages"])

    until(empty, "kvmd has given everything back")
    door.close()


@pytest.mark.parametrize("over", ["its own channel", "another's", "each the other's"])
def test_an_objects_fd_in_half_a_frame_does_not_keep_it(kvmd: System, over: str) -> None:
    half = frame(REQUEST, 1, {"op": "KVM_CHECK_EXTENSION", "cap": 1}, 1)[:11]
    with ExitStack() as stack:
        door, mm, vm = a_vm(stack, kvmd.socket("kvmd"))
        own = [vm.copy(), mm.copy(), door.copy()]
        if over == "its own channel":
            vm.send(half, own[:1])
        elif over == "another's":
            door.send(half, own[:1])
        else:
            for peer, fd in ((vm, own[1]), (mm, own[2]), (door, own[0])):
                peer.send(half, [fd])
        close_all(own)
        if over == "another's":
            assert door.hung_up(), "a door that stays open keeps nothing"
    wait_empty(kvmd)


class Imported:
    """A VM with a page that a vCPU mapped, whose importer died and left its lease to us."""

    def __init__(self, stack: ExitStack, running: System) -> None:
        self.door, self.mm, self.vm = a_vm(stack, running.socket("kvmd"))
        self.hva = self.mm.ask("MMAP", {"size": 4096})[0]["addr"]
        self.region = {**NO_SLOT, "memory_size": 4096, "userspace_addr": self.hva}
        self.vm.ask("KVM_SET_USER_MEMORY_REGION", self.region)
        cpu = keep(stack, self.vm.open("KVM_CREATE_VCPU", {"vcpu_id": 0}))
        cpu.ask("KVM_SET_CPUID2", {"maxphyaddr": 46})
        tdp = keep(stack, self.vm.open("KVM_CREATE_TDP_FD", {"as_id": 0}))
        peer = self.door.open("TDP_FD_GET", {}, [tdp.sock.fileno()])
        fds = peer.ask("TDP_REGISTER_IMPORTER", {"name": "test"})[1]
        self.lease = fds.pop()
        close_all(fds)
        cpu.ask("KVM_RUN", {"program": [("w", 0, b"x")]})
        peer.close()

    def requests(self) -> dict[str, tuple[Plain, dict[str, Any]]]:
        """Such as wait for the lease to end, and take no fd."""
        remap = {"size": 4096, "addr": self.hva, "fixed": True}
        return {
            "KVM_SET_USER_MEMORY_REGION": (self.vm, NO_SLOT),
            "MMAP": (self.mm, remap),
            "MADVISE": (self.mm, {"addr": self.hva, "size": 4096, "advice": "dontneed"}),
            "KVM_SET_USER_MEMORY_REGION2": (self.vm, {**NO_SLOT, "guest_memfd_offset": 0, "guest_memfd": 7}),
            "ZAP_GFN_RANGE": (self.vm, {"gpa": 0, "size": 4096}),
        }


@pytest.mark.parametrize(
    "op",
    ["KVM_SET_USER_MEMORY_REGION", "MMAP", "MADVISE", "KVM_SET_USER_MEMORY_REGION2", "ZAP_GFN_RANGE"],
)
def test_a_lease_sent_with_what_waits_for_it_is_refused(kvmd: System, op: str) -> None:
    with ExitStack() as stack:
        imported = Imported(stack, kvmd)
        peer, body = imported.requests()[op]
        assert peer.ask(op, body, [imported.lease]) == errno.EINVAL
        os.close(imported.lease)
        assert not isinstance(peer.ask(op, body), int)
    wait_empty(kvmd)


def test_a_lease_sent_for_a_guest_memfd_is_not_kept(kvmd: System) -> None:
    """A slot that is deleted does not look at the guest_memfd, whatever the flag says."""
    with ExitStack() as stack:
        imported = Imported(stack, kvmd)
        body = {"op": "KVM_SET_USER_MEMORY_REGION2", **NO_SLOT, "flags": 4, "guest_memfd": 7}
        imported.vm.send(frame(REQUEST, 900, {**body, "guest_memfd_offset": 0}, 1), [imported.lease])
        os.close(imported.lease)
        assert imported.vm.receive()[1] == 900
    wait_empty(kvmd)
