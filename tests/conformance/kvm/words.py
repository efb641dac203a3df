"""The words of a recording: what a step may say.  One that is not here is told, never passed over.

A recording is not ours: it may ask with a word that we do not know, or know by another name.  What a step
says and nobody looks at would be an answer that was not compared, so each of its keys has to be one of these.
"""

from __future__ import annotations

from typing import Any

from tests.conformance.kvm.step import Step, UnknownWord

RANGE = {"addr", "size"}
FILE = {"memfd", "gmem"}
MAPPING = RANGE | FILE | {"prot", "kind", "offset"}
REGION = {"slot", "flags", "guest_phys_addr", "memory_size", "userspace_addr"}
POINTERS = {"pointer", "argp"}

HOST: dict[str, set[str]] = {
    "mmap": MAPPING,
    "mmap_fixed": MAPPING,
    "munmap": RANGE,
    "mremap": {
        *("addr", "old_addr", "old", "old_size", "old_len", "size"),
        *("new_size", "new_len", "to", "new", "dst", "new_addr"),
    },
    "mprotect": RANGE | {"prot"},
    "madvise": RANGE | {"advice"},
    "write": {"addr", "hex"},
    "touch": {"addr", "pages", "offset", "byte"},
    "read": {"addr", "pages", "offset"},
    "peek": {"addr", "n", "got"},
    "fork": set(),
    "unfork": set(),
    "memfd": {"name", "size"},
    "ftruncate": FILE | {"size"},
    "punch_hole": FILE | {"offset", "size"},
    "file_write": FILE | {"offset", "hex"},
    "file_read": FILE | {"offset", "n", "got"},
    "thp_kib": RANGE | {"kib"},
}
IOCTL: dict[str, set[str]] = {
    "KVM_SET_USER_MEMORY_REGION": REGION,
    "KVM_SET_USER_MEMORY_REGION2": REGION | {"guest_memfd", "guest_memfd_offset", "pad1", "pad2"},
    "KVM_CHECK_EXTENSION": {"cap"},
    "KVM_ENABLE_CAP": {"cap", "flags", "args"},
    "KVM_CREATE_VCPU": {"id"},
    "KVM_GET_DIRTY_LOG": {"slot", "dirty_bitmap"},
    "KVM_CLEAR_DIRTY_LOG": {"slot", "first_page", "num_pages", "dirty_bitmap", "bits"},
    "KVM_RESET_DIRTY_RINGS": set(),
    "KVM_SET_MEMORY_ATTRIBUTES": {"address", "size", "attributes", "flags"},
    "KVM_CREATE_GUEST_MEMFD": {"size", "flags", "reserved"},
    "KVM_SET_MSRS": {"index", "value", "vcpu"},
}
UFFD: dict[str, set[str]] = {
    "open": {"user_mode_only"},
    "register": {"addr", "size", "mode"},
    "unregister": {"addr", "size"},
    "fault": {"addr", "flags"},
    "copy": {"addr", "hex", "wp"},
    "zeropage": {"addr", "size"},
    "writeprotect": {"addr", "size", "on"},
    "close": set(),
}
MARKS = {"shadow_only", "vendor", "note"}
GUEST = {"vcpu", "reads", "exits", "done", "concurrent", "immediate_exit"}
RING = {"vcpu", "entries"}
OUT = {"npages", "popcount", "dirty", "bitmap", "bytes"}
EXIT = {"errno", "exit_reason", "mmio", "io", "memory_fault", "internal"}


def check(step: Step) -> None:
    """Raises UnknownWord, naming the first."""
    kind, what = step.kind, step.body.get(step.kind)
    if not kind:
        raise UnknownWord(f"unknown step: {sorted(step.body)}")
    keys = {kind, "errno", *MARKS}
    match kind:
        case "host":
            _known("host step", what, HOST)
            _only(f"argument of {what}", step.args, HOST[str(what)])
            keys.add("args")
        case "ioctl":
            _known("ioctl", what, IOCTL)
            _only(f"argument of {what}", step.args, IOCTL[str(what)] | POINTERS)
            _only("result", step.body.get("out") or (), OUT)
            keys |= {"args", "ret", "out", "save", "other_mm", "on_other_vm", "argp"}
        case "uffd":
            _known("uffd step", what, UFFD)
            keys |= UFFD[str(what)]
        case "ring":
            _known("ring step", what, {"harvest": RING})
            keys |= RING
        case "guest":
            for exit_ in step.body.get("exits") or ():
                _only("part of an exit", exit_, EXIT)
            keys |= GUEST
    _only(f"word of {step.doing}", step.body, keys)


def _known(kind: str, what: Any, known: dict[str, set[str]]) -> None:
    if what not in known:
        raise UnknownWord(f"unknown {kind} {what!r}")


def _only(what: str, said: Any, known: set[str]) -> None:
    for word in said:
        if word not in known:
            raise UnknownWord(f"unknown {what}: {word!r}")
