"""A device that asks for anything, in any order, without end: every group it ends is answered, once."""

from __future__ import annotations

import random
import signal

import pytest

from protocol.units import PAGE_SIZE
from tests.integration.fake_silicon import RID, FakeSilicon, hostile, page_request
from tests.integration.test_iommufd_uapi import ioas_of, paging
from tests.kit.daemons import eventually
from tests.kit.vmm import Vmm, vm_stats

SUCCESS, INVALID, FAILURE = 0, 1, 0xF
SEED = 20231202
RAM = 1 << 30
RING = 2048


async def still_serves(fake: FakeSilicon, rig: Vmm, prgi: int = 500) -> None:
    """A well-behaved request is served, so the queue goes on and its head moves."""
    seen = len(fake.answers)
    fake.send(page_request(RAM - PAGE_SIZE, prgi))
    answers = await fake.wait_answers(seen + 1)
    assert answers[seen:] == [(RID, prgi, SUCCESS)]
    assert await rig.host.kvmd.violations() == []


ADDRESSES = [
    (0, SUCCESS),
    (RAM - PAGE_SIZE, SUCCESS),
    (RAM, INVALID),
    (0xFEE0_0000, INVALID),
    (1 << 47, INVALID),
    ((1 << 48) - PAGE_SIZE, INVALID),
    (1 << 48, INVALID),
    (1 << 57, INVALID),
    ((1 << 64) - PAGE_SIZE, INVALID),
]


@pytest.mark.rfc("RFC-85")
async def test_any_address_is_answered() -> None:
    async with hostile() as (fake, rig):
        for prgi, (addr, code) in enumerate(ADDRESSES):
            fake.send(page_request(addr, prgi, rights=3))
            assert (await fake.wait_answers(prgi + 1))[prgi:] == [(RID, prgi, code)]
        await still_serves(fake, rig)


@pytest.mark.rfc("RFC-83", "RFC-84")
async def test_every_pasid_is_invalid_and_none_is_served() -> None:
    async with hostile() as (fake, rig):
        pasids = [0, 1, 77, (1 << 20) - 1]
        fake.send(*(page_request(0, n, pasid=pasid) for n, pasid in enumerate(pasids)))
        assert await fake.wait_answers(4) == [(RID, n, INVALID) for n in range(4)]
        assert (await vm_stats(rig.host))["io_pf_taken"] == 0
        await still_serves(fake, rig)


@pytest.mark.rfc("RFC-84")
async def test_stop_markers_are_swallowed() -> None:
    async with hostile() as (fake, rig):
        fake.send(*(page_request(0, n, rights=0, pasid=n) for n in range(400)))
        fake.send(*(page_request(0, n, rights=0) for n in range(400)))
        await still_serves(fake, rig)
        assert len(fake.answers) == 1


async def test_half_a_group_does_not_outlive_the_hwpt_it_was_asked_for_on() -> None:
    """A whole group of the same index was answered INVALID after a replacement."""
    async with hostile() as (fake, rig):
        _, device = rig.bound
        other = await paging(rig, await ioas_of(rig))
        fake.send(page_request(RAM, 5, last=False))  # no RAM is there
        await still_serves(fake, rig)
        assert (await rig.host.iommufdd.stats())["partial_held"] == 1
        for hwpt in (other, rig.hwpt_id):
            await device.attach(hwpt)
            assert (await rig.host.iommufdd.stats())["partial_held"] == 0
        fake.send(page_request(0, 5, last=False), page_request(PAGE_SIZE, 5))
        assert (await fake.wait_answers(2))[1:] == [(RID, 5, SUCCESS)]
        assert await rig.host.iommufdd.violations() == []


@pytest.mark.rfc("RFC-85")
async def test_functions_that_are_not_there_or_not_attached_are_invalid() -> None:
    async with hostile(functions=2) as (fake, rig):
        rids = [0, RID + 8, RID + 16, 0xFFFF]
        fake.send(*(page_request(0, n, rid=rid) for n, rid in enumerate(rids)))
        assert await fake.wait_answers(4) == [(rid, n, INVALID) for n, rid in enumerate(rids)]
        await still_serves(fake, rig)


@pytest.mark.rfc("RFC-81")
async def test_a_group_of_hundreds_is_answered_once_and_a_bad_page_in_it_decides() -> None:
    async with hostile() as (fake, rig):
        pages = [n * PAGE_SIZE for n in range(300)]
        parts = [page_request(page, 1, last=page == pages[-1]) for page in pages]
        fake.send(*parts)
        assert await fake.wait_answers(1) == [(RID, 1, SUCCESS)]
        assert (await vm_stats(rig.host))["pages_4k"] == 300
        pages = [RAM - n * PAGE_SIZE for n in range(10)]  # the first is no RAM
        fake.send(*(page_request(page, 2, last=page == pages[-1]) for page in pages))
        assert (await fake.wait_answers(2))[1:] == [(RID, 2, INVALID)]
        assert (await vm_stats(rig.host))["pages_4k"] == 300, "those behind it were not handled"
        await still_serves(fake, rig)


@pytest.mark.rfc("RFC-82")
async def test_groups_that_never_end_are_held_up_to_the_size_of_the_ring_and_discarded() -> None:
    async with hostile() as (fake, rig):
        for _ in range(3):
            fake.send(*(page_request(n * PAGE_SIZE, n % 400, last=False) for n in range(RING)))
        await still_serves(fake, rig)
        stats = await rig.host.iommufdd.stats()
        assert (stats["partial_held"], stats["partial_discarded"]) == (RING, 2 * RING)
        assert fake.unit is not None
        assert (fake.unit.consumed, fake.unit.left) == (3 * RING + 1, 0), "the head moves on"
        await rig.bound[1].detach()
        assert (await rig.host.iommufdd.stats())["partial_held"] == 0
        assert len(fake.answers) == 1


@pytest.mark.rfc("RFC-82")
async def test_an_overrun_discards_partial_groups_clears_the_flag_and_goes_on() -> None:
    async with hostile() as (fake, rig):
        for n in range(20):
            fake.send(page_request(0, 1, last=False), overflow=True)
            await still_serves(fake, rig, n)
        assert fake.unit is not None
        await eventually(fake.unit.cleared, lambda count: count == 20, "each overflow is cleared")
        stats = await rig.host.iommufdd.stats()
        assert (stats["partial_held"], stats["partial_discarded"]) == (0, 20)


async def test_entries_of_random_bytes_are_answered_if_they_end_a_group() -> None:
    chance = random.Random(SEED)
    async with hostile() as (fake, rig):
        due = 0
        for _ in range(40):
            entries = []
            for _ in range(50):
                raw = bytearray(chance.randbytes(32))
                raw[0] = chance.choice((1, 1, 1, raw[0]))
                rights = raw[8] & 3
                reserved = raw[1] & 0xFE or raw[6] & 0xC0 or raw[7] or any(raw[16:])
                marker = not reserved and not rights
                due += raw[0] == 1 and bool(raw[8] & 4) and not marker
                entries.append(bytes(raw))
            fake.send(*entries)
        await fake.wait_answers(due)
        await still_serves(fake, rig)
        assert len(fake.answers) == due + 1


async def test_the_same_group_asked_and_ended_over_and_over_is_answered_each_time() -> None:
    """A group index used again before its answer: PCIe forbids it, nothing may break by it."""
    async with hostile() as (fake, rig):
        asked = len(fake.asked)
        fake.send(*(page_request(n % 8 * PAGE_SIZE, 7) for n in range(1000)))
        assert set(await fake.wait_answers(1000)) == {(RID, 7, SUCCESS)}
        await still_serves(fake, rig)
        assert len(fake.answers) == 1001
        assert len(fake.asked) == asked, "answers are posted, nobody waits for what comes of them"


async def test_requests_go_on_through_detach_and_destroy_and_none_is_left() -> None:
    async with hostile() as (fake, rig):
        iommu, device = rig.bound
        sent = 0
        for n in range(10):
            fake.send(*(page_request((n * 40 + k) * PAGE_SIZE, k) for k in range(40)))
            sent += 40
            await device.detach()
            fake.send(page_request(0, 41))
            sent += 1
            await device.attach(rig.hwpt_id)
        await fake.wait_answers(sent)
        await device.detach()
        await iommu.destroy(rig.hwpt_id)
        fake.send(page_request(0, 42))
        assert (await fake.wait_answers(sent + 1))[-1] == (RID, 42, INVALID)
        assert len(fake.answers) == sent + 1


@pytest.mark.defect("B-40")
async def test_answers_to_silicon_that_is_gone_are_counted_as_lost() -> None:
    """B-40: nobody looked whether a page group response could be sent."""
    async with hostile() as (fake, rig):
        fake.send(*(page_request(n * PAGE_SIZE, n) for n in range(200)))
        assert fake.link is not None
        fake.daemons.signal("iommufdd", signal.SIGSTOP)  # it reads them when the link is gone
        fake.link.flush()
        fake.link.close()
        fake.daemons.signal("iommufdd", signal.SIGCONT)
        stats = await eventually(
            rig.host.iommufdd.stats, lambda s: s["responses"] == 200, "every group is answered"
        )
        assert stats["responses_lost"] > 0
        fake.let_go()


async def test_a_function_that_ends_no_group_takes_nobody_elses_room() -> None:
    """The store of partial groups is each function's own, as the kernel's list is; nobody's has none."""
    async with hostile(functions=2) as (fake, rig):
        iommu, _ = rig.bound
        neighbour = await rig.host.iommufdd.open_device(1)
        await neighbour.bind(iommu)
        await neighbour.attach(rig.hwpt_id)
        fake.send(*(page_request(n * PAGE_SIZE, n % 400, last=False) for n in range(RING)))
        fake.send(*(page_request(n * PAGE_SIZE, n % 400, last=False, rid=0xFFFF) for n in range(RING)))
        pages = [n * PAGE_SIZE for n in range(3)]
        fake.send(*(page_request(page, 1, last=page == pages[-1], rid=RID + 8) for page in pages))
        assert await fake.wait_answers(1) == [(RID + 8, 1, SUCCESS)]
        assert (await vm_stats(rig.host))["pages_4k"] == len(pages)
        stats = await rig.host.iommufdd.stats()
        assert (stats["partial_held"], stats["partial_discarded"]) == (RING, 0)
        neighbour.close()
