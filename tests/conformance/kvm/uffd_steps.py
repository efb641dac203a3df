"""`uffd` steps: userfaultfd, from whoever serves its events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from protocol.units import PAGE_SIZE
from qemu_shim.vmm.process import Uffd
from tests.conformance.kvm.step import CaseFailed, Step, UnknownWord
from tests.conformance.kvm.world import KernelObjects


async def open_(world: KernelObjects, step: Step) -> None:
    world.uffd = await world.process.userfaultfd(user_mode_only=step.body.get("user_mode_only", False))
    world.closing(world.uffd.close)


async def register(world: KernelObjects, step: Step) -> None:
    await _uffd(world).register(step.body["addr"], step.body["size"], step.body["mode"])


async def unregister(world: KernelObjects, step: Step) -> None:
    await _uffd(world).unregister(step.body["addr"], step.body["size"])


async def fault(world: KernelObjects, step: Step) -> None:
    """The next event; waits for it."""
    addr, flags = await _uffd(world).next_event()
    step.expect("addr", step.body["addr"], addr)
    step.expect("flags", step.body["flags"], flags)


async def copy(world: KernelObjects, step: Step) -> None:
    """What is recorded is the start of the page."""
    await _uffd(world).copy(step.body["addr"], bytes.fromhex(step.body["hex"]), wp=step.body.get("wp", False))


async def zeropage(world: KernelObjects, step: Step) -> None:
    await _uffd(world).zeropage(step.body["addr"], step.body.get("size", PAGE_SIZE))


async def writeprotect(world: KernelObjects, step: Step) -> None:
    await _uffd(world).writeprotect(step.body["addr"], step.body["size"], step.body["on"])


async def close(world: KernelObjects, step: Step) -> None:
    _uffd(world).close()
    world.uffd = None


def _uffd(world: KernelObjects) -> Uffd:
    if world.uffd is None:
        raise CaseFailed("no userfaultfd is open")
    return world.uffd


STEPS: dict[str, Callable[[KernelObjects, Step], Awaitable[None]]] = {
    "open": open_,
    "register": register,
    "unregister": unregister,
    "fault": fault,
    "copy": copy,
    "zeropage": zeropage,
    "writeprotect": writeprotect,
    "close": close,
}


async def play(world: KernelObjects, step: Step) -> None:
    kind = step.body["uffd"]
    if kind not in STEPS:
        raise UnknownWord(f"unknown uffd step {kind!r}")
    await step.answer(STEPS[kind](world, step))
