"""KVM_CREATE_TDP_FD in the core: who may export, which root is lent, and what that forbids afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmd.core.export import exports as exports_module
from kvmd.core.export.exports import Exports
from kvmd.core.export.tdp_fd import CreateTdpFd, ExportedTdp, Exporter, check_create
from kvmd.core.host import CpuFeatures, Obstacle
from kvmd.core.mm.vma import Prot
from kvmd.core.stats import vm_stats
from kvmd.core.tables.tdp_table import Role, Root, TdpMmu
from protocol.errors import UapiError
from protocol.pt.ept import EPT_AD
from protocol.units import Hpa, Hva
from tests.kit.kvmd import World
from tests.kit.lent import Backed
from tests.kit.refusals import refused

GOOD = CreateTdpFd(0, 0, 0)
WIDE = CpuFeatures(maxphyaddr=52, ept_levels=5)


@pytest.fixture
def world() -> World:
    return Backed(0x100, 16)


# -- what refuses ----------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-12", "RFC-13", "RFC-14")
@pytest.mark.parametrize(
    ("obstacle", "number", "word"),
    [
        (Obstacle.COMPILED_OUT, errno.EOPNOTSUPP, "built without"),
        (Obstacle.AMD, errno.EOPNOTSUPP, "vendor"),
        (Obstacle.NO_TDP_MMU, errno.EINVAL, "TDP MMU"),
        (Obstacle.HYPERV, errno.EINVAL, "Hyper-V"),
        (Obstacle.PRESENT_BIT_11, errno.EINVAL, "bit 11"),
    ],
)
def test_a_kvm_that_cannot_export_says_why(world: World, obstacle: Obstacle, number: int, word: str) -> None:
    world.host.obstacles = frozenset({obstacle})
    with refused(number, word):
        world.export()
    world.host.obstacles = frozenset()
    world.export()


# Everything is wrong at once; the third of each row puts right what the check before it said.
ORDER: list[tuple[int, str, dict[str, Any]]] = [
    (errno.EOPNOTSUPP, "built without", {"obstacles": frozenset(Obstacle) - {Obstacle.COMPILED_OUT}}),
    (errno.EINVAL, "mode 1", {"mode": 0}),
    (errno.EEXIST, "exported already", {"taken": False}),
    (errno.EOPNOTSUPP, "vendor", {"obstacles": frozenset({Obstacle.NO_TDP_MMU})}),
    (errno.EINVAL, "only 0", {"as_id": 0}),
    (errno.EINVAL, "TDP MMU", {"obstacles": frozenset()}),
    (errno.EINVAL, "no vCPU", {"vcpus": 1}),
    (errno.EINVAL, "MAXPHYADDR", {"width": 46}),
    (errno.EINVAL, "non-coherent", {"dma": 0}),
]


@pytest.mark.rfc("RFC-11", "RFC-12", "RFC-13", "RFC-14")
def test_the_checks_come_in_the_order_of_the_series() -> None:
    now: dict[str, Any] = {"as_id": 1, "mode": 1, "taken": True, "vcpus": 0, "width": 0, "dma": 1}
    now["obstacles"] = frozenset(Obstacle)

    def check() -> None:
        vm = Exporter(now["vcpus"], now["width"], now["dma"], now["obstacles"])
        check_create(CreateTdpFd(now["as_id"], now["mode"], 0), 2, lambda _: bool(now["taken"]), vm)

    for number, word, put_right in ORDER:
        with refused(number, word):
            check()
        now |= put_right
    check()


def race(world: World) -> None:
    """Two callers at once: whatever one checks, the other has checked too before either goes on."""
    made: list[ExportedTdp] = []
    refusals: list[int] = []
    for _ in range(2):
        try:
            made.append(world.export())
        except UapiError as error:
            refusals.append(error.errno)
    assert refusals == [errno.EEXIST], "both have a TDP FD of one address space"
    assert world.vm.exports.tdps == {0: made[0]}


@pytest.mark.rfc("RFC-16")
@pytest.mark.defect("B-02")
def test_of_two_creates_one_wins(world: World) -> None:
    race(world)


@pytest.mark.defect("B-02")
def test_looking_in_one_section_and_listing_in_another_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_before_either_was_listed(request: CreateTdpFd, spaces: int, _: object, vm: Exporter) -> None:
        check_create(request, spaces, lambda _: False, vm)

    monkeypatch.setattr(exports_module, "check_create", looked_before_either_was_listed)
    with pytest.raises(AssertionError, match="EXPORT happened to one that is EXPORTED"):
        race(world)


# -- which root is lent ----------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-21")
def test_the_root_of_a_running_vcpu_is_lent(world: World) -> None:
    vcpu = world.vm.vcpus[0]
    world.guest_write(vcpu, 0x10_0000, b"x")
    exported = world.export()
    assert vcpu.arch.roots[0] is not None
    assert exported.meta.root_hpa == vcpu.arch.roots[0].hpa
    assert len(world.vm.mmu.roots) == 1


@pytest.mark.rfc("RFC-22")
def test_a_vcpu_that_runs_after_the_export_runs_on_the_exported_root(world: World) -> None:
    exported = world.export()
    assert world.vm.vcpus[0].arch.roots[0] is None
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"x")
    later = world.create_vcpu(1)
    world.guest_read(later, 0x10_0000, 1)
    assert {vcpu.arch.roots[0] for vcpu in world.vm.vcpus} == {exported.root}
    assert later.arch.ept_violations == 0


@pytest.mark.rfc("RFC-23", "RFC-24")
@pytest.mark.parametrize(
    ("widths", "least", "level"), [((52, 46), 46, 4), ((46, 40), 40, 4), ((52, 49), 49, 5)]
)
def test_the_width_of_a_vm_is_its_narrowest_vcpus(widths: tuple[int, ...], least: int, level: int) -> None:
    world = World(WIDE)
    for number, width in enumerate(widths):
        world.create_vcpu(number, width)
    world.vm.vcpus.create(9)  # it has no CPUID, so it does not count
    assert world.vm.vcpus.maxphyaddr == least
    assert world.export().meta.level == level


# -- what it forbids afterwards --------------------------------------------------------------------------


@pytest.mark.rfc("RFC-24")
@pytest.mark.defect("B-28")
@pytest.mark.parametrize(("exported", "later"), [(46, 52), (52, 46), (48, 49)])
def test_a_later_vcpu_that_would_run_apart_is_refused(exported: int, later: int) -> None:
    """In the series it silently gets another root, and each page is faulted in twice from then on."""
    world = World(WIDE)
    world.create_vcpu(0, exported)
    world.export()
    vcpu = world.vm.vcpus.create(1)
    with refused(errno.EINVAL, "-level root"):
        world.vm.set_maxphyaddr(vcpu, later)
    assert vcpu.arch.maxphyaddr == 0
    world.vm.set_maxphyaddr(vcpu, exported)
    assert vm_stats(world.vm)["vcpus_apart"] == 0


@pytest.mark.defect("B-28")
def test_another_width_that_takes_the_same_root_is_let_in() -> None:
    world = World(WIDE)
    world.create_vcpu(0, 46)
    world.export()
    world.create_vcpu(1, 40)
    world.create_vcpu(2, 48)
    assert vm_stats(world.vm)["vcpus_apart"] == 0


@pytest.mark.defect("B-28")
def test_a_vcpu_apart_from_before_is_reported() -> None:
    world = World(WIDE)
    world.create_vcpu(0, 46)
    world.create_vcpu(1, 52)
    world.export()
    assert vm_stats(world.vm)["vcpus_apart"] == 1


@pytest.mark.rfc("RFC-11")
@pytest.mark.defect("B-27")
def test_non_coherent_dma_and_an_export_exclude_each_other(world: World) -> None:
    """Registered later, it would only warn at each fault, and entries of two memory types would mix."""
    world.vm.exports.register_noncoherent_dma()
    world.vm.exports.register_noncoherent_dma()
    world.vm.exports.unregister_noncoherent_dma()
    with refused(errno.EINVAL, "1 times"):
        world.export()
    world.vm.exports.unregister_noncoherent_dma()
    with refused(errno.EINVAL, "not registered"):
        world.vm.exports.unregister_noncoherent_dma()
    exported = world.export()
    with refused(errno.EBUSY, "write-back"):
        world.vm.exports.register_noncoherent_dma()
    assert vm_stats(world.vm)["noncoherent_dma"] == 0
    world.run(world.vm.exports.close(exported))
    world.vm.exports.register_noncoherent_dma()


# -- failing on the way ----------------------------------------------------------------------------------


def counts(world: World) -> tuple[object, ...]:
    roots = [(root.hpa, root.refs, root.exported, root.invalid) for root in world.vm.mmu.roots]
    return roots, dict(world.vm.exports.tdps), world.host.pool.in_use, world.host.pool.held(world.vm.id)


def unreadable(world: World, _: pytest.MonkeyPatch) -> CreateTdpFd:
    return CreateTdpFd(0, 0, 0, Hva(0x6000_0000))


def without_table_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> CreateTdpFd:
    """No vCPU has run, so a root must be made."""
    monkeypatch.setattr(world.host.pool, "_end", world.host.pool._next)
    return GOOD


def unwritable(world: World, _: pytest.MonkeyPatch) -> CreateTdpFd:
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"its root is there, to be lent")
    return CreateTdpFd(0, 0, 0, world.map(1, prot=Prot.READ))


def half_unwritable(world: World, _: pytest.MonkeyPatch) -> CreateTdpFd:
    """The struct reaches from a page that can be written into one that cannot."""
    world.guest_write(world.vm.vcpus[0], 0x10_0000, b"its root is there, to be lent")
    world.map(1, hva=0x7000_0000)
    world.map(1, hva=0x7000_1000, prot=Prot.READ)
    return CreateTdpFd(0, 0, 0, Hva(0x7000_0FF8))


STEPS: dict[str, tuple[Callable[[World, pytest.MonkeyPatch], CreateTdpFd], int]] = {
    "copy in": (unreadable, errno.EFAULT),
    "root": (without_table_pages, errno.ENOMEM),
    "copy out": (unwritable, errno.EFAULT),
    "copy out of half": (half_unwritable, errno.EFAULT),
}


def check_undone(world: World, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails, everything is as it was, and without the failure it works."""
    failing, number = STEPS[step]
    with monkeypatch.context() as patch:
        request, before = failing(world, patch), counts(world)
        with refused(number):
            world.run(world.vm.exports.create(request))
    assert counts(world) == before
    world.run(world.vm.exports.create(CreateTdpFd(0, 0, 0, world.map(1))))


@pytest.mark.rfc("RFC-18", "RFC-20")
@pytest.mark.defect("B-01", "B-06")
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_undoes_the_ones_before(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_undone(world, step, monkeypatch)


def goes_on_without_a_page(self: TdpMmu, role: Role) -> Root:
    return Root(Hpa(0), role, EPT_AD, refs=1)


def does_nothing(*_: object) -> None:
    pass


async def asks_nobody(*_: object) -> None:
    pass


PLANTED: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "B-01: the new object is not tested": ("root", TdpMmu, "get_root", goes_on_without_a_page),
    "B-06: the address space stays taken": ("copy out", Exports, "release", does_nothing),
    "B-06: nobody asks before publishing": (
        "copy out",
        exports_module,
        "copy_to_user",
        asks_nobody,
    ),
}


@pytest.mark.defect("B-01", "B-06")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_create_that_does_not_undo_is_noticed(
    world: World, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, *plant = PLANTED[bug]
    monkeypatch.setattr(*plant)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_undone(world, step, monkeypatch)
