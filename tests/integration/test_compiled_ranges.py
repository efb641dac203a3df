"""A real kvmd whose table grows gets compiled code for its ranges, after it serves, and answers as before."""

from __future__ import annotations

from pathlib import Path

from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.vmm.machine import connect_host
from tests.kit.daemons import System, system, until

LOG = 1
AT = 4 * GIB
REGION = 2 * MIB
REGIONS = 40  # a table of small leaves each: more than it takes to be worth it
SIZE = REGIONS * REGION


def has_compiled(daemons: System) -> bool:
    return "compiled code has come" in daemons.log("kvmd")


def has_numba(daemons: System) -> bool:
    return "llvmlite" in Path(f"/proc/{daemons.pid('kvmd')}/maps").read_text()


async def test_ranges_answer_the_same_before_and_after_compiled_code_has_come() -> None:
    with system({}) as daemons:
        async with connect_host(daemons.directory) as host:
            process = await host.kvmd.start_process()
            vm = await host.kvmd.create_vm(process)
            vcpu = await vm.create_vcpu(0)
            hva, bitmap = await process.mmap(SIZE), await process.mmap(MIB)

            async def store(regions: range) -> None:
                ran = await vcpu.run([("w", AT + n * REGION + 3 * PAGE_SIZE, b"x") for n in regions])
                assert not ran.errno, ran

            async def told() -> set[int]:
                await vm.get_dirty_log(0, bitmap)
                bits = int.from_bytes(await process.read(bitmap, SIZE // PAGE_SIZE // 8), "little")
                return {page for page in range(SIZE // PAGE_SIZE) if bits >> page & 1}

            async def round_of(regions: range) -> None:
                await vm.set_user_memory_region(0, AT, SIZE, hva, LOG)
                assert await told() == set()
                for some in (regions, range(0, len(regions), 7)):
                    await store(some)
                    assert await told() == {n * (REGION // PAGE_SIZE) + 3 for n in some}
                assert await told() == set()
                await vm.set_user_memory_region(0, AT, SIZE, hva)
                await store(regions)
                await vm.set_user_memory_region(0, AT, 0, hva)
                assert await host.kvmd.violations() == []

            await round_of(range(REGIONS // 2))
            assert not has_compiled(daemons)
            assert not has_numba(daemons)
            await vm.set_user_memory_region(0, AT, SIZE, hva)
            await store(range(REGIONS))
            until(lambda: has_compiled(daemons), "compiled code in kvmd")
            assert has_numba(daemons)
            await round_of(range(REGIONS))
            for file in (vcpu, vm, process):
                file.close()
