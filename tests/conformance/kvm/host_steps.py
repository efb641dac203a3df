"""`host` steps: what the process that owns the VM does with its memory and its files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from kvmd.core.mm.madvise import ADVICE
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.process import Kind, MemFd
from tests.conformance.kvm.step import CaseFailed, Step, UnknownWord
from tests.conformance.kvm.world import KernelObjects

Args = dict[str, Any]
T = TypeVar("T")

PROTECTIONS = {"none": "none", "r": "r", "w": "w", "rw": "rw", "wr": "rw"}
KINDS: dict[str, Kind] = {
    "anon": "anon",
    "anon_shared": "anon_shared",
    "shared_anon": "anon_shared",
    "file_shared": "file_shared",
    "shared_file": "file_shared",
    "file_private": "file_private",
    "private_file": "file_private",
    "gmem": "file_shared",
}


async def mmap(world: KernelObjects, step: Step, *, fixed: bool = False) -> None:
    args = step.args
    kind = _one_of("kind", KINDS, args.get("kind", "anon"))
    await world.process.mmap(
        args["size"],
        addr=args["addr"],
        prot=_prot(args.get("prot", "rw")),
        kind=kind,
        fixed=fixed,
        offset=args.get("offset", 0),
        file=_file(world, step) if kind.startswith("file") else None,
    )


async def mmap_fixed(world: KernelObjects, step: Step) -> None:
    await mmap(world, step, fixed=True)


async def munmap(world: KernelObjects, step: Step) -> None:
    await world.process.munmap(step.args["addr"], step.args["size"])


async def mremap(world: KernelObjects, step: Step) -> None:
    """One size may stand for both; without a new address it stays or moves."""
    old = _named(step.args, "addr", "old_addr", "old")
    old_size = _named(step.args, "old_size", "old_len", "size")
    new_size = _named({"new_size": old_size, **step.args}, "new_len", "new_size")
    new = _named({"new_addr": None, **step.args}, "to", "new", "dst", "new_addr")
    await world.process.mremap(old, old_size, new_size, new_addr=new)


def _named(args: Args, *names: str) -> Any:
    """The argument, under the first of its names that is there."""
    return args[next((name for name in names if name in args), names[0])]


async def mprotect(world: KernelObjects, step: Step) -> None:
    await world.process.mprotect(step.args["addr"], step.args["size"], _prot(step.args["prot"]))


async def madvise(world: KernelObjects, step: Step) -> None:
    advice = _one_of("advice", {name: name for name in ADVICE}, step.args["advice"].lower())
    await world.process.madvise(step.args["addr"], step.args["size"], advice)


async def write(world: KernelObjects, step: Step) -> None:
    await world.process.write(step.args["addr"], bytes.fromhex(step.args["hex"]))


async def touch(world: KernelObjects, step: Step) -> None:
    for addr in _pages(step.args):
        await world.process.write(addr, bytes([step.args.get("byte", 1)]))


async def read(world: KernelObjects, step: Step) -> None:
    for addr in _pages(step.args):
        await world.process.read(addr, 1)


async def peek(world: KernelObjects, step: Step) -> None:
    came = await world.process.read(step.args["addr"], step.args["n"])
    step.expect("got", step.args["got"], came.hex())


async def fork(world: KernelObjects, step: Step) -> None:
    child = await world.process.fork()
    world.closing(child.close)
    world.children.append(child)


async def unfork(world: KernelObjects, step: Step) -> None:
    if not world.children:
        raise CaseFailed("unfork: no child lives")
    world.children.pop().close()


async def memfd(world: KernelObjects, step: Step) -> None:
    file = await world.process.memfd(step.args["name"], step.args["size"])
    world.closing(file.close)
    world.files[step.args["name"]] = file


async def ftruncate(world: KernelObjects, step: Step) -> None:
    await _file(world, step).truncate(step.args["size"])


async def punch_hole(world: KernelObjects, step: Step) -> None:
    await _file(world, step).punch_hole(step.args["offset"], step.args["size"])


async def file_write(world: KernelObjects, step: Step) -> None:
    await _file(world, step).pwrite(step.args["offset"], bytes.fromhex(step.args["hex"]))


async def file_read(world: KernelObjects, step: Step) -> None:
    came = await _file(world, step).pread(step.args["offset"], step.args["n"])
    step.expect("got", step.args["got"], came.hex())


async def thp_kib(world: KernelObjects, step: Step) -> None:
    came = await world.process.anon_huge_kib(step.args["addr"], step.args["size"])
    step.expect("kib", step.args["kib"], came)


def _file(world: KernelObjects, step: Step) -> MemFd:
    """The file a step names: a memfd, or a guest_memfd; `gmem` alone is the one that was saved."""
    args = step.args
    named = next((args[word] for word in ("memfd", "gmem") if args.get(word) is not None), "gmem")
    return world.file(named)


def _one_of(what: str, known: Mapping[str, T], said: str) -> T:
    if said not in known:
        raise UnknownWord(f"unknown {what} {said!r}")
    return known[said]


def _prot(recorded: str) -> str:
    """Whether the process may execute the memory is nothing to its guest."""
    return _one_of("prot", PROTECTIONS, recorded if recorded == "x" else recorded.replace("x", "") or "none")


def _pages(args: Args) -> Iterator[int]:
    """An address in each page of `pages`, runs of [first, count]."""
    for first, count in args["pages"]:
        for page in range(first, first + count):
            yield args["addr"] + page * PAGE_SIZE + args.get("offset", 0)


STEPS: dict[str, Callable[[KernelObjects, Step], Awaitable[None]]] = {
    step.__name__: step
    for step in (
        mmap,
        mmap_fixed,
        munmap,
        mremap,
        mprotect,
        madvise,
        write,
        touch,
        read,
        peek,
        fork,
        unfork,
        memfd,
        ftruncate,
        punch_hole,
        file_write,
        file_read,
        thp_kib,
    )
}


async def play(world: KernelObjects, step: Step) -> None:
    kind = step.body["host"]
    if kind not in STEPS:
        raise UnknownWord(f"unknown host step {kind!r}")
    await step.answer(STEPS[kind](world, step))
