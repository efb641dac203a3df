"""`ioctl` steps: requests to a VM, from its own process or another, with good pointers or bad ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qemu_shim.vmm.kvm_client import Vm
from tests.conformance.kvm import bitmap
from tests.conformance.kvm.caps import CAPS
from tests.conformance.kvm.step import Step, UnknownWord
from tests.conformance.kvm.world import KernelObjects, pointer

GUARD_BYTES = 64  # of a buffer beyond what the kernel is to write


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl; `how`: where its struct is said to lie, and the process that asks if not the VM's own."""

    world: KernelObjects
    step: Step
    vm: Vm
    how: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A field of the struct: zero where only a pointer was recorded."""
        if name not in self.step.args and "argp" not in self.how:
            raise UnknownWord(f"no {name} among {sorted(self.step.args)}")
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
    at, room = pointer(call.get("dirty_bitmap", "buffer"))
    size = min(room, out.get("bytes", bitmap.size_of(out.get("npages", 0))) + GUARD_BYTES)
    await call.world.process.write(at, bytes([bitmap.FILL]) * size)
    await call.vm.get_dirty_log(call["slot"], at, **call.how)
    if size and out:
        _expect_bitmap(call.step, out, await call.world.process.read(at, size))


def _expect_bitmap(step: Step, out: dict[str, Any], buffer: bytes) -> None:
    written = bitmap.written(buffer)
    expected = out.get("bytes", bitmap.size_of(out.get("npages", 0)))
    step.expect("bytes written to the bitmap", expected, written)
    if "bitmap" in out:
        step.expect("bitmap", out["bitmap"], buffer[:written].hex())
    if "dirty" in out:
        step.expect("dirty", out["dirty"], bitmap.to_runs(buffer[:written]))


async def clear_dirty_log(call: Call) -> None:
    """`dirty_bitmap` is what lies in a good buffer, or where it is said to lie; then `bits` are what does."""
    where: str | int = "buffer"
    given = call.get("dirty_bitmap", "")
    content = _hex(given)
    if content is None:
        where, content = given, b""
    if "bits" in call.step.args:
        content = bitmap.from_runs(call.step.args["bits"], call["num_pages"])
    at, room = pointer(where)
    await call.world.process.write(at, content[:room])
    await call.vm.clear_dirty_log(call["slot"], call["first_page"], call["num_pages"], at, **call.how)


async def reset_rings(call: Call) -> int:
    return await call.vm.reset_dirty_rings(**call.how)


async def set_memory_attributes(call: Call) -> None:
    await call.vm.set_memory_attributes(
        call["address"], call["size"], call["attributes"], call["flags"], **call.how
    )


async def create_guest_memfd(call: Call) -> None:
    made = await call.vm.create_guest_memfd(call["size"], call["flags"], call.get("reserved", 0), **call.how)
    call.world.closing(made.close)
    call.world.save(call.step.body.get("save", "gmem"), made)


async def set_msrs(call: Call) -> int:
    vcpu = await call.world.vcpu(call.get("vcpu", 0))
    return await vcpu.set_msr(call["index"], call["value"])


def _cap(call: Call) -> int:
    name = call["cap"]
    if isinstance(name, int):
        return name
    if name not in CAPS:
        raise UnknownWord(f"unknown capability {name}")
    return CAPS[name]


def _hex(text: str | int) -> bytes | None:
    """The bytes, if it says any."""
    try:
        return bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        return None


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


async def play(world: KernelObjects, step: Step) -> None:
    name = step.body["ioctl"]
    if name not in STEPS:
        raise UnknownWord(f"unknown ioctl {name!r}")
    how: dict[str, Any] = {}
    said = [held[word] for held in (step.args, step.body) for word in ("pointer", "argp") if word in held]
    if said:
        how["argp"], _ = pointer(said[0])
    if step.body.get("other_mm"):
        how["caller"] = await world.other_process()
    vm = await world.other_vm() if step.body.get("on_other_vm") else world.vm
    ret = await step.answer(STEPS[name](Call(world, step, vm, how)))
    if ret is not None:
        step.expect_recorded("ret", ret)
