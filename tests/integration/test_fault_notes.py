"""The channel of KVM's fault notes between processes: what is sent, and that nothing waits for its reader."""

from __future__ import annotations

import errno

import pytest

from protocol.errors import UapiError
from protocol.rpc.channel import Body
from protocol.uapi.kvm import KvmFaultedIn
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.kit.daemons import eventually
from tests.kit.vmm import GUEST_START, fault_notes, rigged, vm_only, vm_stats

PAGES = 40


async def test_notes_come_in_order_as_the_struct_says_and_none_for_a_device(host: Host) -> None:
    told: list[Body] = []
    async with rigged(host) as rig:
        notes = await fault_notes(host, rig.vm, told)
        assert (await rig.fill(GUEST_START)).name == "SUCCESS"
        assert told == []
        await rig.vcpu.run([("w", GUEST_START + page * PAGE_SIZE, b"x") for page in range(PAGES)])
        await eventually(lambda: vm_stats(host), lambda s: s["notes"] == len(told) == PAGES - 1, "all came")
        assert [KvmFaultedIn.model_validate(body).op for body in told] == ["KVM_FAULTED_IN"] * len(told)
        assert [body["gfn"] for body in told] == [(GUEST_START >> 12) + page for page in range(1, PAGES)]
        notes.close()


async def test_a_channel_of_notes_keeps_no_vm_and_ends_with_it(host: Host) -> None:
    async with vm_only(host) as rig:
        notes = await fault_notes(host, rig.vm)
        rig.close_vm()
        await eventually(host.kvmd.stats, lambda s: s["vms"] == [], "the VM is gone")
        await eventually(host.kvmd.stats, lambda s: notes.closed, "the channel was hung up")


async def test_a_request_or_a_word_on_the_channel_of_notes_reaches_nothing(host: Host) -> None:
    async with vm_only(host) as rig:
        notes = await fault_notes(host, rig.vm)
        with pytest.raises(UapiError) as caught:
            await notes.ask("KVM_FAULTED_IN", {"gfn": 0, "npages": 1, "writable": True})
        assert caught.value.errno == errno.ENOTTY
        notes.notify("KVM_FAULTED_IN", {"gfn": 0, "npages": 1, "writable": True})
        await eventually(host.kvmd.stats, lambda s: notes.closed, "a notification ends the channel")
        await rig.vcpu.run([("w", GUEST_START, b"x")])
        assert (await vm_stats(host))["notes"] == 0
