"""Peers that break the protocol lose their connection; the daemon and everybody else lose nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qemu_shim.vmm.daemons import DAEMONS
from tests.integration.attacks import ATTACKS, BREACHES, SEED, close_all
from tests.integration.plain import NOTIFY, REQUEST, Plain, frame
from tests.kit.daemons import TRUSTING, System, system, until

NAMES = tuple(spec.name for spec in DAEMONS)
# Two queues of 16 in a group, dedicated with block on fault and shared, enabled: (register, dword)
BRING_UP = (
    *((0x400, 0b11), (0x420, 0b1111)),
    *((0x500, 16), (0x508, 0b11), (0x50C, 21 | 5 << 5)),
    *((0x520, 16), (0x524, 16), (0x52C, 21 | 5 << 5)),
    *((0xA0, 1 << 20), (0xA0, 6 << 20), (0xA0, 6 << 20 | 1)),
)


@pytest.fixture(scope="module")
def attacked() -> Iterator[System]:
    """Each daemon must end with status 0 after all of it."""
    with system({**TRUSTING, "device_sim": ["--devices", "2"]}) as running:
        yield running


@pytest.fixture(scope="module")
def bare_unit() -> Iterator[System]:
    """A device_sim without driver: its link is free."""
    with system(None, None, "device_sim") as running:
        yield running


def serves(running: System, name: str) -> bool:
    """A stranger is answered."""
    peer = Plain.connect(running.socket(name))
    body, _ = peer.ask("STATS")
    peer.close()
    return bool(body)


# -- objects: how to come by an fd of each kind ------------------------------------------------------------


def process(stack: ExitStack, kvmd: Path) -> tuple[Plain, Plain]:
    door = keep(stack, Plain.connect(kvmd))
    return door, keep(stack, door.open("MM_CREATE"))


def keep(stack: ExitStack, peer: Plain) -> Plain:
    stack.callback(peer.close)
    return peer


def a_vm(stack: ExitStack, kvmd: Path) -> tuple[Plain, Plain, Plain]:
    door, mm = process(stack, kvmd)
    dev = keep(stack, door.open("OPEN", {"path": "/dev/kvm"}))
    vm = keep(stack, dev.open("KVM_CREATE_VM", {}, [mm.sock.fileno()]))
    return door, mm, vm


def a_tdp_fd(stack: ExitStack, running: System) -> tuple[Plain, Plain]:
    door, _, vm = a_vm(stack, running.socket("kvmd"))
    vcpu = keep(stack, vm.open("KVM_CREATE_VCPU", {"vcpu_id": 0}))
    vcpu.ask("KVM_SET_CPUID2", {"maxphyaddr": 46})
    return door, keep(stack, vm.open("KVM_CREATE_TDP_FD", {"as_id": 0}))


def dev_kvm(stack: ExitStack, running: System) -> Plain:
    door, _ = process(stack, running.socket("kvmd"))
    return door.open("OPEN", {"path": "/dev/kvm"})


def vm(stack: ExitStack, running: System) -> Plain:
    return a_vm(stack, running.socket("kvmd"))[2]


def vcpu(stack: ExitStack, running: System) -> Plain:
    return a_vm(stack, running.socket("kvmd"))[2].open("KVM_CREATE_VCPU", {"vcpu_id": 3})


def mm(stack: ExitStack, running: System) -> Plain:
    return process(stack, running.socket("kvmd"))[1]


def tdp_fd(stack: ExitStack, running: System) -> Plain:
    return a_tdp_fd(stack, running)[1]


def importer(stack: ExitStack, running: System) -> Plain:
    door, tdp = a_tdp_fd(stack, running)
    return door.open("TDP_FD_GET", {}, [tdp.sock.fileno()])


def registered_importer(stack: ExitStack, running: System) -> Plain:
    made = importer(stack, running)
    _, fds = made.ask("TDP_REGISTER_IMPORTER", {"name": "hostile"})
    close_all(fds)
    return made


def mirror(stack: ExitStack, running: System) -> Plain:
    door, memory = process(stack, running.socket("kvmd"))
    return door.open("HMM_MIRROR_GET", {}, [memory.sock.fileno()])


def registered_mirror(stack: ExitStack, running: System) -> Plain:
    """It watches and has pinned, and its lease has ended."""
    door, memory = process(stack, running.socket("kvmd"))
    hva = memory.ask("MMAP", {"size": 4096})[0]["addr"]
    made = door.open("HMM_MIRROR_GET", {}, [memory.sock.fileno()])
    _, fds = made.ask("HMM_REGISTER")
    made.ask("HMM_WATCH", {"start": hva, "size": 4096})
    made.ask("HMM_PIN", {"start": hva, "size": 4096, "write": True})
    close_all(fds)
    return made


def fault_notes(stack: ExitStack, running: System) -> Plain:
    door, _, guest = a_vm(stack, running.socket("kvmd"))
    return door.open("KVM_FAULT_NOTES_GET", {}, [guest.sock.fileno()])


def iommufd(stack: ExitStack, running: System) -> Plain:
    return keep(stack, Plain.connect(running.socket("iommufdd"))).open("OPEN", {"path": "/dev/iommu"})


def mapped_iommufd(stack: ExitStack, running: System) -> Plain:
    """An IOAS on demand maps a page of a process."""
    _, memory = process(stack, running.socket("kvmd"))
    hva = memory.ask("MMAP", {"size": 4096})[0]["addr"]
    made = iommufd(stack, running)
    ioas = made.ask("IOMMU_IOAS_ALLOC", {"flags": 1})[0]["out_ioas_id"]
    body = {"ioas_id": ioas, "flags": 6, "user_va": hva, "length": 4096}
    made.ask("IOMMU_IOAS_MAP", body, [memory.sock.fileno()])
    return made


def vfio(stack: ExitStack, running: System) -> Plain:
    door = keep(stack, Plain.connect(running.socket("iommufdd")))
    until(lambda: devices_free(door), "the device of the attack before is free")
    return door.open("OPEN", {"path": "/dev/vfio/devices/vfio1"})


def devices_free(door: Plain) -> bool:
    answer = door.ask("OPEN", {"path": "/dev/vfio/devices/vfio1"})
    if isinstance(answer, int):
        return False
    close_all(answer[1])
    until(lambda: door.ask("STATS")[0]["devices_bound"] == 0, "unbound")
    return True


def portal(stack: ExitStack, running: System) -> Plain:
    held = keep(stack, vfio(stack, running))
    io = keep(stack, iommufd(stack, running))
    held.ask("VFIO_DEVICE_BIND_IOMMUFD", {}, [io.sock.fileno()])
    return held.open("VFIO_DEVICE_MMAP", {"region": 2})


def link(stack: ExitStack, running: System) -> Plain:
    door = keep(stack, Plain.connect(running.link))
    made: list[Plain] = []

    def linked() -> bool:
        answer = door.ask("LINK")
        if isinstance(answer, int):
            return False
        made.append(Plain(socket.socket(fileno=answer[1][0])))
        return True

    until(linked, "the link of the attack before is free")
    return made[0]


OBJECTS: list[tuple[Callable[[ExitStack, System], Plain], str]] = [
    (dev_kvm, "kvmd"),
    (vm, "kvmd"),
    (vcpu, "kvmd"),
    (mm, "kvmd"),
    (tdp_fd, "kvmd"),
    (importer, "kvmd"),
    (registered_importer, "kvmd"),
    (mirror, "kvmd"),
    (registered_mirror, "kvmd"),
    (fault_notes, "kvmd"),
    (iommufd, "iommufdd"),
    (mapped_iommufd, "iommufdd"),
    (vfio, "iommufdd"),
    (portal, "device_sim"),
]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
@pytest.mark.parametrize("name", NAMES)
def test_a_front_door_survives(attacked: System, name: str, attack: Callable[[Plain], None]) -> None:
    witness = Plain.connect(attacked.socket(name))
    witness.ask("STATS")
    before = attacked.all_fds()
    for _ in range(2):
        peer = Plain.connect(attacked.socket(name))
        attack(peer)
        assert serves(attacked, name)
        peer.close()
    assert witness.ask("STATS")[0]
    attacked.wait_closed(before)
    witness.close()


@pytest.mark.parametrize("attack", BREACHES, ids=named)
@pytest.mark.parametrize("name", NAMES)
def test_a_breach_ends_the_connection(attacked: System, name: str, attack: Callable[[Plain], None]) -> None:
    peer = Plain.connect(attacked.socket(name))
    attack(peer)
    assert peer.hung_up()
    peer.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
@pytest.mark.parametrize(("make", "name"), OBJECTS, ids=named)
def test_an_object_survives_or_goes_alone(
    attacked: System, make: Callable[[ExitStack, System], Plain], name: str, attack: Callable[[Plain], None]
) -> None:
    before = attacked.all_fds()
    with ExitStack() as stack:
        peer = make(stack, attacked)
        attack(peer)
        assert serves(attacked, name)
        peer.close()
    assert all(serves(attacked, other) for other in NAMES)
    attacked.wait_closed(before)


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
def test_the_link_survives_or_goes_alone(bare_unit: System, attack: Callable[[Plain], None]) -> None:
    before = bare_unit.all_fds()
    with ExitStack() as stack:
        peer = link(stack, bare_unit)
        attack(peer)
        assert serves(bare_unit, "device_sim")
        peer.close()
    bare_unit.wait_closed(before)


def test_a_request_id_in_use_ends_the_connection(attacked: System) -> None:
    """An unregister is answered only when the lease has ended: until then its id is taken."""
    before = attacked.all_fds()
    with ExitStack() as stack:
        peer = importer(stack, attacked)
        _, fds = peer.ask("TDP_REGISTER_IMPORTER", {"name": "hostile"})
        peer.send(frame(REQUEST, 50, {"op": "TDP_UNREGISTER_IMPORTER"}))
        peer.send(frame(REQUEST, 50, {"op": "TDP_GET_METADATA"}))
        assert peer.hung_up()
        close_all(fds)
        peer.close()
    attacked.wait_closed(before)


def test_more_unanswered_requests_than_allowed_end_the_connection(attacked: System) -> None:
    """An importer that does not ack holds up every change of the process's memory."""
    before = attacked.all_fds()
    with ExitStack() as stack:
        door, memory, guest = a_vm(stack, attacked.socket("kvmd"))
        hva = memory.ask("MMAP", {"size": 4096})[0]["addr"]
        region = {"slot": 0, "flags": 0, "guest_phys_addr": 0, "memory_size": 4096, "userspace_addr": hva}
        guest.ask("KVM_SET_USER_MEMORY_REGION", region)
        cpu = keep(stack, guest.open("KVM_CREATE_VCPU", {"vcpu_id": 0}))
        cpu.ask("KVM_SET_CPUID2", {"maxphyaddr": 46})
        tdp = keep(stack, guest.open("KVM_CREATE_TDP_FD", {"as_id": 0}))
        peer = keep(stack, door.open("TDP_FD_GET", {}, [tdp.sock.fileno()]))
        _, fds = peer.ask("TDP_REGISTER_IMPORTER", {"name": "hostile"})
        cpu.ask("KVM_RUN", {"program": [("w", 0, b"x")]})
        drop = {"op": "MADVISE", "addr": hva, "size": 4096, "advice": "dontneed"}
        memory.send(b"".join(frame(REQUEST, n, drop) for n in range(100, 5000)))
        assert memory.hung_up()
        assert serves(attacked, "kvmd")
        assert door.ask("STATS")[0]["frames"] == 1
        close_all(fds)
    attacked.wait_closed(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_storm_of_peers_that_hang_up_at_once_leaves_nothing(attacked: System, name: str) -> None:
    before = attacked.all_fds()
    for n in range(500):
        peer = Plain.connect(attacked.socket(name))
        if n % 2:
            peer.send(frame(REQUEST, 1, {"op": "STATS"}))
        peer.close()
    assert serves(attacked, name)
    attacked.wait_closed(before)


def test_objects_made_and_dropped_in_a_storm_leave_nothing(attacked: System) -> None:
    before = attacked.all_fds()
    for _ in range(50):
        with ExitStack() as stack:
            keep(stack, registered_importer(stack, attacked))
            keep(stack, portal(stack, attacked))
    attacked.wait_closed(before)
    witness = Plain.connect(attacked.socket("kvmd"))
    assert witness.ask("STATS")[0]["vm_count"] == 0
    witness.close()


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("MEMORY_ADD", {"windows": [["tables", 0, 4096]]}),
        ("MEMORY_ADD", {"windows": [["tables", 1 << 20, 1 << 40]]}),
        ("MEMORY_ADD", {"windows": [["nonsense", 1 << 20, 4096]]}),
        ("MEMORY_ADD", {"windows": [["frames", 1 << 32, 4097]]}),
        ("MEMORY_ADD", {"windows": [["frame_tags", 1 << 32, 8]]}),
        ("MEMORY_ADD", {"windows": [["frame_tags", 12345, 4095]]}),
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_refused(bare_unit: System, op: str, body: dict[str, object]) -> None:
    """What the driver hands over is checked, whoever it is."""
    before = bare_unit.all_fds()
    with ExitStack() as stack, open(os.memfd_create("window", os.MFD_ALLOW_SEALING), "r+b") as file:
        file.truncate(1 << 20)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        driver = keep(stack, link(stack, bare_unit))
        answer = driver.ask(op, body, [file.fileno(), file.fileno()])
        assert isinstance(answer, int) or body["windows"][0][0] == "frame_tags"  # type: ignore[index]
        assert serves(bare_unit, "device_sim")
    bare_unit.wait_closed(before)


def test_a_window_that_could_shrink_is_refused_and_shrinking_it_ends_nobody(bare_unit: System) -> None:
    """The unit walked it, and died of SIGBUS."""
    before = bare_unit.all_fds()
    window = ["tables", 1 << 20, 1 << 20]
    with ExitStack() as stack, open(os.memfd_create("window", os.MFD_ALLOW_SEALING), "r+b") as file:
        file.truncate(1 << 20)
        driver = keep(stack, link(stack, bare_unit))
        assert driver.ask("MEMORY_ADD", {"windows": [window]}, [file.fileno()] * 2) == errno.EINVAL
        file.truncate(0)
        assert serves(bare_unit, "device_sim")
        file.truncate(1 << 20)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        assert not isinstance(driver.ask("MEMORY_ADD", {"windows": [window]}, [file.fileno()] * 2), int)
        with pytest.raises(PermissionError):
            file.truncate(0)
    bare_unit.wait_closed(before)


def test_dsa_descriptors_of_random_bytes_are_answered(attacked: System) -> None:
    chance = random.Random(SEED)
    with ExitStack() as stack:
        guest = keep(stack, portal(stack, attacked))
        for offset, dword in BRING_UP:
            store = {"op": "MMIO_WRITE", "offset": offset, "data": dword.to_bytes(4, "little")}
            guest.send(frame(NOTIFY, 0, store))
        for _ in range(200):
            guest.send(frame(NOTIFY, 0, {"op": "MOVDIR64B", "wq": 0, "descriptor": chance.randbytes(64)}))
            guest.send(frame(NOTIFY, 0, {"op": "MOVDIR64B", "wq": 1, "descriptor": chance.randbytes(64)}))
            store = {
                "op": "MMIO_WRITE",
                "offset": chance.randrange(0x500, 0x1000),
                "data": chance.randbytes(4),
            }
            guest.send(frame(NOTIFY, 0, store))
        shown = {}
        for register in (0xA8, 0xC0):
            guest.send(frame(REQUEST, register, {"op": "MMIO_READ", "offset": register, "size": 32}))
            while (answer := guest.receive())[1] != register:
                pass
            shown[register] = answer[2]["data"][0]
        assert shown[0xA8] == 0x20, "nobody lets it do DMA, so the device is not enabled, nor a queue"
        assert shown[0xC0] & 1 == 0, "and what no queue takes is discarded, and not told of"
        assert serves(attacked, "device_sim")
