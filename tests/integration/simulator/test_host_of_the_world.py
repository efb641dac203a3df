"""What kvmd's host is like in the simulator: it hides no mistake by chance."""

from __future__ import annotations

from protocol.pt import bits
from qemu_shim.api import Context, Scenario
from qemu_shim.vmm.designs import SHARED
from simulator.world.system import play
from tests.integration.simulator.drawn import Drawn

ROUNDS = 4  # a block of all free children is joined again, and the host has four of the largest


def test_a_frame_that_was_given_up_does_not_come_back_while_there_are_others() -> None:
    had: list[int] = []

    async def scenario(ctx: Context) -> None:
        guest = await ctx.boot_for(4)
        (page,) = guest.pages(1)
        for _ in range(ROUNDS):
            await guest.write(page, b"there")
            _, _, entry = (await guest.inspect_gpa(page))["path"][-1]
            had.append(entry & bits.ADDRESS_MASK)
            await guest.discard(page)

    done = play(Scenario(name="again", summary="", play=scenario), SHARED, Drawn(None))
    assert done.problems == []
    assert len(had) == len(set(had)) == ROUNDS
