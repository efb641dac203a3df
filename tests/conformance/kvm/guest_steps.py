"""`guest` and `ring` steps: batches on a vCPU, what the host does meanwhile, and its dirty ring."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import zip_longest
from typing import Any

import trio

from tests.conformance.kvm.step import Step, UnknownWord
from tests.conformance.kvm.world import KernelObjects

HEAD_START_S = 0.01  # the guest is to poll, or to wait, by the time the host acts
END_OF_BATCH = {"direction": "out", "port": 16}  # how the recorder's guest said that it was done

PlayStep = Callable[[KernelObjects, Step], Awaitable[None]]


async def play_guest(world: KernelObjects, step: Step, play: PlayStep) -> None:
    """`play` is for the concurrent steps."""
    cpu = await world.cpu(step.body.get("vcpu", 0))
    recorded = [entry for entry in step.body.get("exits") or () if not _ends_batch(entry)]
    replies = [entry["mmio"]["reply"] for entry in recorded if "reply" in entry.get("mmio", ())]
    exits: list[dict[str, Any]] = []

    async def run() -> None:
        exits.extend(await cpu.run(_batch(step), replies, step.body.get("immediate_exit", 0)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for concurrent in step.concurrent():
            await trio.sleep(HEAD_START_S)
            await play(world, concurrent)
    for number, (expected, came) in enumerate(zip_longest(recorded, exits, fillvalue="none")):
        step.expect(f"exit {number}", *_comparable(expected, came))
    step.expect("done", step.body.get("done", True), cpu.done)
    step.expect_recorded("reads", cpu.reads)


def _ends_batch(entry: dict[str, Any]) -> bool:
    return entry.get("errno", "0") == "0" and bool(END_OF_BATCH.items() <= entry.get("io", {}).items())


def _comparable(expected: Any, came: Any) -> tuple[Any, Any]:
    """What of an exit is KVM's answer: of an internal error its suberror, where it was recorded; of EINTR
    nothing else, for the rest of kvm_run is what the last exit left there."""
    if expected == "none" or came == "none":
        return expected, came
    if expected.get("errno") == "EINTR":
        return expected["errno"], came["errno"]
    if "internal" in expected:
        return {**expected, "internal": {"suberror": expected["internal"].get("suberror")}}, came
    return expected, {key: value for key, value in came.items() if key != "internal"}


def _batch(step: Step) -> list[Any] | None:
    batch = step.body["guest"]
    if batch == "resume":
        return None
    if not isinstance(batch, list):
        raise UnknownWord(f"unknown guest step {batch!r}")
    return batch


async def play_ring(world: KernelObjects, step: Step) -> None:
    if step.body["ring"] != "harvest":
        raise UnknownWord(f"unknown ring step {step.body['ring']!r}")
    ring = await world.ring(step.body.get("vcpu", 0))
    step.expect_recorded("entries", [list(entry) for entry in ring.harvest()])
