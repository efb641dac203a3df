"""What iommufdd thinks of an exported TDP that no kvmd of ours would offer: the test is its kvmd."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio

from protocol.errors import UapiError
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.kernel.port import StreamSocket
from protocol.pt import bits
from protocol.pt.meta import META_BYTES, TYPE_EPT, ExportedTdpMeta, promised_masks
from protocol.pt.walk import ept_rules
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.socket import Listener, connect
from protocol.units import LEVEL_1G, Hpa, Level
from qemu_shim.vmm.iommufd_client import Iommu, Iommufdd, VfioDevice
from tests.kit.daemons import System, system
from tests.patience import PATIENCE_S

GOOD = ExportedTdpMeta(TYPE_EPT, Level(4), Hpa(1 << 20), LEVEL_1G, promised_masks(ept_rules(46, LEVEL_1G)))
LOW, HIGH = GOOD.rsvd_bits_mask


def without_bit_11(row: int, level: int) -> bytes:
    """One of the ten masks does not promise that bit 11 stays 0."""
    masks = [list(LOW), list(HIGH)]
    masks[row][level - 1] &= ~bits.SNOOP
    return replace(GOOD, rsvd_bits_mask=(tuple(masks[0]), tuple(masks[1]))).to_bytes()


ROWS = [
    ("another type", errno.EINVAL, replace(GOOD, type=2).to_bytes()),
    ("type 0", errno.EINVAL, replace(GOOD, type=0).to_bytes()),
    ("3 levels", errno.EOPNOTSUPP, replace(GOOD, level=Level(3)).to_bytes()),
    ("5 levels", errno.EOPNOTSUPP, replace(GOOD, level=Level(5)).to_bytes()),
    ("6 levels", errno.EOPNOTSUPP, replace(GOOD, level=Level(6)).to_bytes()),
    ("negative levels", errno.EOPNOTSUPP, replace(GOOD, level=Level(-1)).to_bytes()),
    ("512G leaves", errno.EOPNOTSUPP, replace(GOOD, max_huge_page_level=Level(4)).to_bytes()),
    ("no metadata", errno.EFAULT, b""),
    ("too short", errno.EFAULT, GOOD.to_bytes()[:-1]),
    ("too long", errno.EFAULT, bytes(META_BYTES + 1)),
    *(
        (f"mask {row} {level}", errno.EOPNOTSUPP, without_bit_11(row, level))
        for row in range(2)
        for level in range(1, 6)
    ),
]


@pytest.fixture(scope="module")
def without_kvmd() -> Iterator[System]:
    with system(None, None, "device_sim", "iommufdd") as running:
        yield running


class FakeKvmd:
    """Takes any fd for a TDP FD, and says `meta` of it."""

    def __init__(self, loop: Loop, meta: bytes | UapiError) -> None:
        self._loop = loop
        self._meta = meta  # or why there is none
        self.asked: list[str] = []
        self.channels: list[Channel] = []

    def on_connect(self, sock: StreamSocket) -> None:
        self.channels.append(Channel(self._loop, sock, "fake", on_request=self._serve))

    def _serve(self, channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
        self.asked.append(body["op"])
        fds.close()
        if body["op"] == "TDP_FD_GET":
            ours, theirs = socket.socketpair()
            self.on_connect(ours)
            channel.answer(request_id, {}, [theirs.detach()])
        elif body["op"] == "TDP_GET_METADATA" and isinstance(self._meta, bytes):
            channel.answer(request_id, {"meta": self._meta})
        elif isinstance(self._meta, UapiError):
            channel.answer_error(request_id, self._meta)
        else:
            channel.answer_error(request_id, UapiError(errno.EBUSY, "enough"))


async def open_when_free(iommufdd: Iommufdd) -> VfioDevice:
    """The case before closed it: until it is unbound opening it is EBUSY."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                return await iommufdd.open_device(0)
            except UapiError:
                await trio.sleep(0.001)


async def alloc_errno(running: System, meta: bytes | UapiError) -> tuple[int, list[str]]:
    """What IOMMU_HWPT_ALLOC says of that metadata, and what was asked of KVM."""
    crashes: list[BaseException] = []
    loop = Loop(LINUX, Flows(crashes.append))
    fake = FakeKvmd(loop, meta)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve)
        listener = Listener(loop, running.importers, fake.on_connect)
        door = Channel(loop, await connect(loop.kernel, running.socket("iommufdd")), "iommufdd")
        iommufdd = Iommufdd(door)
        iommu = Iommu(loop, (await door.ask("OPEN", {"path": "/dev/iommu"})).fds.take(0), "iommufd")
        device: VfioDevice = await open_when_free(iommufdd)
        device_id = await device.bind(iommu)
        pretended, other = socket.socketpair()
        with pytest.raises(UapiError) as refused:
            await iommu.hwpt_alloc_kvm(device_id, pretended.fileno())
        pretended.close()
        other.close()
        for close in (iommu.close, device.close, door.close, *(c.close for c in fake.channels)):
            close()
        listener.close()
        nursery.cancel_scope.cancel()
    loop.close()
    assert crashes == []
    return refused.value.errno, fake.asked


@pytest.mark.rfc("RFC-45", "RFC-46", "RFC-47", "RFC-49", "RFC-50")
@pytest.mark.parametrize(("number", "meta"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
async def test_a_table_no_unit_can_walk_is_refused_before_anything_is_registered(
    without_kvmd: System, number: int, meta: bytes
) -> None:
    assert await alloc_errno(without_kvmd, meta) == (number, ["TDP_FD_GET", "TDP_GET_METADATA"])


async def test_a_table_that_can_be_walked_is_registered_next(without_kvmd: System) -> None:
    asked = ["TDP_FD_GET", "TDP_GET_METADATA", "TDP_REGISTER_IMPORTER"]
    assert await alloc_errno(without_kvmd, GOOD.to_bytes()) == (errno.EBUSY, asked)


@pytest.mark.defect("B-36")
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENODEV, errno.EOPNOTSUPP])
async def test_why_kvm_has_no_metadata_is_passed_on(without_kvmd: System, number: int) -> None:
    """The series makes an EFAULT of it, whatever it was."""
    why = UapiError(number, "no metadata today")
    assert await alloc_errno(without_kvmd, why) == (number, ["TDP_FD_GET", "TDP_GET_METADATA"])
