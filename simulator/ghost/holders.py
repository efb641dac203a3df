"""Which kinds of caches there are, the first word of a `Holder`, and what goes with which process."""

from __future__ import annotations

CPU_CACHES = ("vcpu",)
UNIT_CACHES = ("iotlb", "psc", "devtlb")
IMPORTED_CACHES = ("imported",)  # of hardware whose driver is another importer than iommufdd
ALL_CACHES = (*CPU_CACHES, *UNIT_CACHES, *IMPORTED_CACHES)

# What goes with a process: its caches, and what it had to end.
GOES_WITH: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kvmd": (CPU_CACHES, ("fault", "invalidation", "loan of who hung up")),
    "qemu_shim": (IMPORTED_CACHES, ()),
    "iommufdd": ((), ("request", "table of a dead KVM")),
    "device_sim": (
        UNIT_CACHES,
        ("page request group", "group without credits", "overflow", "link of a dead driver"),
    ),
}
