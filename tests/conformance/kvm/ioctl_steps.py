"""`ioctl` steps: requests to a VM, from its own process or another, with good pointers or bad ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qemu_shim.kvm_client import Vm
from tests.conformance.kvm import bitmap
from tests.conformance.kvm.caps import CAPS
from tests.conformance.kvm.step import CaseFailed, Step
from tests.conformance.kvm.world import BAD_POINTERS, BUFFER_HVA, World

GUARD_BYTES = 64  # of a buffer beyond what the kernel is to write


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl; `how`: where its struct is said to lie, and the process that asks if not the VM's own."""

    world: World
    step: Step
    vm: Vm
    how: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A field of the struct: zero where only a pointer was recorded."""
        if name not in self.step.args and "argp" not in self.how:
            raise CaseFailed(f"no {name} among {sorted(self.step.args)}")
        return self.step.args.get(name, 0)

    def get(self, name: str, default: Any) -> Any:
        return self.step.args.get(name, default)


async def set_region(call: Call) -> None:
    await call.vm.set_user_memory_region(
        call["slot"],
        call["guest_phys_addr"],
        call["memory_size"],
        call["userspace_addr"],
        call["flags"],
        **call.how,
    )


async def set_region2(call: Call) -> None:
    await call.vm.set_user_memory_region2(
        call["slot"],
        call["guest_phys_addr"],
        call["memory_size"],
        call["userspace_addr"],
        call["flags"],
        guest_memfd=call.world.fd(call.get("guest_memfd", 0)),
        guest_memfd_offset=call.get("guest_memfd_offset", 0),
        pad1=call.get("pad1", 0),
        pad2=call.get("pad2", 0),
        **call.how,
    )


async def check_extension(call: Call) -> int:
    return await call.vm.check_extension(_cap(call), **call.how)


async def enable_cap(call: Call) -> None:
    await call.vm.enable_cap(_cap(call), *call.get("args", ()), flags=call["flags"], **call.how)


async def create_vcpu(call: Call) -> None:
    await call.world.create_vcpu(call.vm, call["id"], **call.how)


async def get_dirty_log(call: Call) -> None:
    """The buffer is filled before, so that what the kernel wrote can be told from what it left."""
    out = call.step.body.get("out") or {}
    size = out.get("bytes", bitmap.size_of(out.get("npages", 0))) + GUARD_BYTES
    pointer = _pointer(call, call.get("dirty_bitmap", "buffer"))
    if pointer == BUFFER_HVA:
        await call.world.process.write(BUFFER_HVA, bytes([bitmap.FILL]) * size)
    await call.vm.get_dirty_log(call["slot"], pointer, **call.how)
    if pointer == BUFFER_HVA and out:
        _expect_bitmap(call.step, out, await call.world.process.read(BUFFER_HVA, size))


def _expect_bitmap(step: Step, out: dict[str, Any], buffer: bytes) -> None:
    written = bitmap.written(buffer)
    expected = out.get("bytes", bitmap.size_of(out.get("npages", 0)))
    step.expect("bytes written to the bitmap", expected, written)
    if "bitmap" in out:
        step.expect("bitmap", out["bitmap"], buffer[:written].hex())
    if "dirty" in out:
        step.expect("dirty", out["dirty"], bitmap.to_runs(buffer[:written]))


async def clear_dirty_log(call: Call) -> None:
    given = call.get("dirty_bitmap", "")
    if "bits" in call.step.args:
        given = bitmap.from_runs(call.step.args["bits"], call["num_pages"]).hex()
    pointer = BUFFER_HVA
    if isinstance(given, int) or given in BAD_POINTERS:
        pointer = _pointer(call, given)
    else:
        await call.world.process.write(BUFFER_HVA, _hex(given))
    await call.vm.clear_dirty_log(call["slot"], call["first_page"], call["num_pages"], pointer, **call.how)


async def reset_rings(call: Call) -> int:
    return await call.vm.reset_dirty_rings(**call.how)


async def set_memory_attributes(call: Call) -> None:
    await call.vm.set_memory_attributes(
        call["address"], call["size"], call["attributes"], call["flags"], **call.how
    )


async def create_guest_memfd(call: Call) -> None:
    made = await call.vm.create_guest_memfd(call["size"], call["flags"], call.get("reserved", 0), **call.how)
    call.world.closing(made.close)
    if "save" in call.step.body:
        call.world.saved[f"${call.step.body['save']}"] = made


async def set_msrs(call: Call) -> int:
    vcpu = await call.world.vcpu(call.get("vcpu", 0))
    return await vcpu.set_msr(call["index"], call["value"])


def _cap(call: Call) -> int:
    name = call["cap"]
    if isinstance(name, int):
        return name
    if name not in CAPS:
        raise CaseFailed(f"unknown capability {name}")
    return CAPS[name]


def _pointer(call: Call, recorded: str | int) -> int:
    if isinstance(recorded, int):
        return recorded
    if recorded != "buffer" and recorded not in BAD_POINTERS:
        raise CaseFailed(f"unknown dirty_bitmap {recorded!r}")
    return BAD_POINTERS.get(recorded, BUFFER_HVA)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise CaseFailed(f"unknown dirty_bitmap {text!r}") from None


STEPS: dict[str, Callable[[Call], Awaitable[int | None]]] = {
    "KVM_SET_USER_MEMORY_REGION": set_region,
    "KVM_SET_USER_MEMORY_REGION2": set_region2,
    "KVM_CHECK_EXTENSION": check_extension,
    "KVM_ENABLE_CAP": enable_cap,
    "KVM_CREATE_VCPU": create_vcpu,
    "KVM_GET_DIRTY_LOG": get_dirty_log,
    "KVM_CLEAR_DIRTY_LOG": clear_dirty_log,
    "KVM_RESET_DIRTY_RINGS": reset_rings,
    "KVM_SET_MEMORY_ATTRIBUTES": set_memory_attributes,
    "KVM_CREATE_GUEST_MEMFD": create_guest_memfd,
    "KVM_SET_MSRS": set_msrs,
}


async def play(world: World, step: Step) -> None:
    name = step.body["ioctl"]
    if name not in STEPS:
        raise CaseFailed(f"unknown ioctl {name!r}")
    how: dict[str, Any] = {}
    if "pointer" in step.args:
        how["argp"] = step.args["pointer"]
    if step.body.get("other_mm"):
        how["caller"] = await world.other_process()
    vm = await world.other_vm() if step.body.get("on_other_vm") else world.vm
    ret = await step.answer(STEPS[name](Call(world, step, vm, how)))
    if ret is not None:
        step.expect_recorded("ret", ret)
