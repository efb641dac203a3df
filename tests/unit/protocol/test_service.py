"""Requests at the border: what is refused, with which errno, and what becomes of a bug of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.errors import PeerError, UapiError
from protocol.flow import Wait
from protocol.rpc.channel import Body, Fds, PeerGone
from protocol.rpc.service import Answer, Method, Notification, Service
from protocol.rpc.session import MAX_BODY_BYTES
from protocol.uapi.message import U32, Message
from tests.unit.protocol.wires import Nothing, Wires, frame, open_fds, wires


class Add(Message):
    one: U32
    other: U32 = 1


class Thing:
    def __init__(self) -> None:
        self.gate: Wait[int] = Wait()
        self.told: list[int] = []
        self.fd_seen = -1


def add(thing: Thing, message: Add, fds: Fds) -> Body:
    return {"sum": message.one + message.other}


def refuse(thing: Thing, message: Nothing, fds: Fds) -> Body:
    raise UapiError(errno.EBUSY, "taken by somebody else")


def crash(thing: Thing, message: Nothing, fds: Fds) -> Body:
    raise ZeroDivisionError("secret detail")


def broken(thing: Thing, message: Nothing, fds: Fds) -> Body:
    raise PeerError("out of order")


def give(thing: Thing, message: Nothing, fds: Fds) -> Answer:
    return Answer({"given": 1}, [os.memfd_create("given")])


def take(thing: Thing, message: Nothing, fds: Fds) -> Body:
    thing.fd_seen = fds.take(0)
    return {}


def peek(thing: Thing, message: Nothing, fds: Fds) -> Body:
    return {"ino": os.fstat(fds.peek(0)).st_ino}


def too_much(thing: Thing, message: Nothing, fds: Fds) -> Body:
    return {"data": bytes(MAX_BODY_BYTES)}


async def wait_and(thing: Thing, message: Add, fds: Fds) -> Body:
    value = await thing.gate
    if value == 0:
        raise UapiError(errno.EPERM, "zero")
    return {"sum": message.one + 10 // (value - 1)}


async def wait_too_much(thing: Thing, message: Nothing, fds: Fds) -> Body:
    await thing.gate
    return {"data": bytes(MAX_BODY_BYTES)}


def on_told(thing: Thing, message: Add) -> None:
    thing.told.append(10 // message.one)


SERVICE: Service[Thing] = Service(
    "thing",
    {
        "ADD": Method(Add, add),
        "REFUSE": Method(Nothing, refuse),
        "CRASH": Method(Nothing, crash),
        "BROKEN": Method(Nothing, broken),
        "GIVE": Method(Nothing, give),
        "TAKE": Method(Nothing, take, 1),
        "PEEK": Method(Nothing, peek, 1),
        "TOO_MUCH": Method(Nothing, too_much),
        "WAIT": Method(Add, wait_and, 1),
        "WAIT_TOO_MUCH": Method(Nothing, wait_too_much),
    },
    notifications={"TOLD": Notification(Add, on_told)},
)


class Served:
    """A Thing served over a socketpair."""

    def __init__(self, wire: Wires) -> None:
        self.wire = wire
        self.thing = Thing()
        self.client, self.server = wire.pair(
            other={"on_request": SERVICE.bind(self.thing), "on_notify": SERVICE.bind_notify(self.thing)}
        )

    def ask(self, op: str, fds: list[int] | None = None, **body: Any) -> Body:
        wait = self.client.call(op, body, fds or [])
        self.wire.pump()
        reply = wait.result()
        reply.fds.close()
        return reply.body

    def error(self, op: str, fds: list[int] | None = None, **body: Any) -> UapiError:
        with pytest.raises(UapiError) as caught:
            self.ask(op, fds, **body)
        return caught.value


@pytest.fixture
def served() -> Iterator[Served]:
    with wires() as wire:
        yield Served(wire)


def test_a_request_is_run_and_answered(served: Served) -> None:
    assert served.ask("ADD", one=3, other=4) == {"sum": 7}
    assert served.ask("ADD", one=3) == {"sum": 4}


@pytest.mark.parametrize("op", ["SUBTRACT", "add", "", "X" * 100_000])
def test_an_unknown_request_is_enotty_and_its_name_is_cut(served: Served, op: str) -> None:
    error = served.error(op)
    assert error.errno == errno.ENOTTY
    assert len(error.why) < 200


@pytest.mark.parametrize("op", [None, 7, ["ADD"], {"a": 1}, b"ADD", True])
def test_a_request_whose_name_is_no_name_is_enotty(served: Served, op: object) -> None:
    wait = served.client.call("ADD", {"op": op})
    served.wire.pump()
    with pytest.raises(UapiError) as caught:
        wait.result()
    assert caught.value.errno == errno.ENOTTY


def test_an_object_may_say_another_errno_for_unknown_requests() -> None:
    service: Service[None] = Service("file", {}, unknown_errno=errno.ENODEV)
    with wires() as wire:
        client, _ = wire.pair(other={"on_request": service.bind(None)})
        wait = client.call("KVM_RUN")
        wire.pump()
        with pytest.raises(UapiError) as caught:
            wait.result()
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"one": "3"},
        {"one": 3.0},
        {"one": True},
        {"one": None},
        {"one": -1},
        {"one": 1 << 32},
        {"one": 3, "extra": 1},
        {"one": 3, "other": b"4"},
        {"one": [3]},
    ],
)
def test_a_field_that_is_missing_extra_or_of_another_type_is_einval(served: Served, body: Body) -> None:
    error = served.error("ADD", **body)
    assert error.errno == errno.EINVAL
    assert error.why.startswith("ADD: ")
    assert served.ask("ADD", one=0xFFFF_FFFF, other=0) == {"sum": 0xFFFF_FFFF}


def test_a_sentence_about_a_bad_field_is_short(served: Served) -> None:
    assert len(served.error("ADD", one="x" * 1_000_000).why) <= 500


def test_keys_that_are_no_text_are_einval(served: Served) -> None:
    with wires() as wire:
        _, raw = wire.raw(on_request=SERVICE.bind(Thing()))
        raw.send(frame(0, 1, {"op": "ADD", "one": 1, b"raw": 2}))
        wire.pump()
        assert [body["errno"] for *_, body in raw.frames()] == [errno.EINVAL]


def test_an_error_with_an_errno_passes_as_it_is(served: Served) -> None:
    error = served.error("REFUSE")
    assert (error.errno, error.why) == (errno.EBUSY, "taken by somebody else")
    assert served.wire.crashes == []


def test_a_bug_is_eio_without_its_details_and_is_reported(served: Served) -> None:
    error = served.error("CRASH")
    assert error.errno == errno.EIO
    assert "secret" not in error.why
    assert [type(crash.__cause__) for crash in served.wire.crashes] == [ZeroDivisionError]
    assert served.ask("ADD", one=1) == {"sum": 2}, "it goes on serving"


def test_requests_behind_a_bug_in_the_same_packet_are_served(served: Served) -> None:
    waits = [served.client.call(op, {}) for op in ("CRASH", "GIVE", "CRASH", "REFUSE")]
    served.wire.pump()
    errnos = []
    for wait in waits:
        try:
            wait.result().fds.close()
            errnos.append(0)
        except UapiError as error:
            errnos.append(error.errno)
    assert errnos == [errno.EIO, 0, errno.EIO, errno.EBUSY]
    assert len(served.wire.crashes) == 2


@pytest.mark.parametrize("op", ["TOO_MUCH", "WAIT_TOO_MUCH"])
def test_an_answer_too_large_to_send_is_our_bug_and_still_an_answer(served: Served, op: str) -> None:
    served.thing.gate.set(1)
    assert served.error(op).errno == errno.EIO
    assert len(served.wire.crashes) == 1


def test_a_broken_protocol_ends_the_connection(served: Served) -> None:
    wait = served.client.call("BROKEN")
    served.wire.pump()
    assert served.server.closed
    with pytest.raises(PeerGone):
        wait.result()
    assert served.wire.crashes == []


# -- fds -----------------------------------------------------------------------------------------------


def test_an_answer_brings_its_fd(served: Served) -> None:
    before = open_fds()
    assert served.ask("GIVE") == {"given": 1}
    assert open_fds() == before


@pytest.mark.parametrize(("op", "count"), [("ADD", 1), ("TAKE", 2), ("PEEK", 8)])
def test_more_fds_than_a_request_takes_are_einval_and_closed(served: Served, op: str, count: int) -> None:
    before = open_fds()
    error = served.error(
        op, [os.memfd_create("x") for _ in range(count)], **({"one": 1} if op == "ADD" else {})
    )
    assert error.errno == errno.EINVAL
    assert open_fds() == before


def test_an_fd_that_is_missing_is_ebadf(served: Served) -> None:
    assert served.error("TAKE").errno == errno.EBADF


def test_a_taken_fd_outlives_its_message_and_a_peeked_one_does_not(served: Served) -> None:
    before = open_fds()
    served.ask("PEEK", [os.memfd_create("x")])
    assert open_fds() == before
    served.ask("TAKE", [os.memfd_create("x")])
    assert open_fds() - before == {served.thing.fd_seen}
    os.close(served.thing.fd_seen)


# -- flows ---------------------------------------------------------------------------------------------


def test_a_flow_answers_when_it_ends_and_others_overtake_it(served: Served) -> None:
    wait = served.client.call("WAIT", {"one": 3}, [os.memfd_create("x")])
    assert served.ask("ADD", one=1) == {"sum": 2}
    assert not wait.done
    served.thing.gate.set(2)
    served.wire.pump()
    assert wait.result().body == {"sum": 13}


@pytest.mark.parametrize(("value", "number", "bugs"), [(0, errno.EPERM, 0), (1, errno.EIO, 1)])
def test_a_flow_fails_like_a_function(served: Served, value: int, number: int, bugs: int) -> None:
    wait = served.client.call("WAIT", {"one": 3}, [os.memfd_create("x")])
    served.wire.pump()
    served.thing.gate.set(value)
    served.wire.pump()
    with pytest.raises(UapiError) as caught:
        wait.result()
    assert caught.value.errno == number
    assert len(served.wire.crashes) == bugs


def test_a_flow_whose_caller_is_gone_ends_quietly(served: Served) -> None:
    served.client.call("WAIT", {"one": 3}, [os.memfd_create("x")])
    served.wire.pump()
    served.client.close()
    served.wire.pump()
    served.thing.gate.set(2)
    served.wire.pump()
    assert served.wire.crashes == []
    assert served.wire.loop.flows.waiting == 0


# -- notifications -------------------------------------------------------------------------------------


def test_a_notification_is_run(served: Served) -> None:
    served.client.notify("TOLD", {"one": 5})
    served.wire.pump()
    assert served.thing.told == [2]


@pytest.mark.parametrize(
    ("op", "body"), [("TELL", {}), ("TOLD", {}), ("TOLD", {"one": -1}), ("ADD", {"one": 1})]
)
def test_a_notification_that_is_unknown_or_malformed_ends_the_connection(
    served: Served, op: str, body: Body
) -> None:
    served.client.notify(op, body)
    served.wire.pump()
    assert served.server.closed
    assert served.thing.told == []
    assert served.wire.crashes == []


def test_a_bug_in_a_notification_is_reported(served: Served) -> None:
    served.client.notify("TOLD", {"one": 0})
    served.client.notify("TOLD", {"one": 1})
    served.wire.pump()
    assert served.thing.told == [10]
    assert [type(crash) for crash in served.wire.crashes] == [ZeroDivisionError]


def test_a_message_does_not_change() -> None:
    message = Add(op="ADD", one=1)
    with pytest.raises(ValidationError):
        message.one = 2


def test_the_server_asks_its_client_over_the_same_channel(served: Served) -> None:
    """kvmd does: an invalidation goes down while the importer's fault is being served."""
    answered: list[Body] = []
    wait = served.client.call("WAIT", {"one": 3})
    served.wire.pump()
    back = served.server.call("ANYTHING")
    back.on_done(lambda w: answered.append({"done": True}))
    served.wire.pump()
    assert served.client.closed, "this client serves no requests, and says so by hanging up"
    assert answered == [{"done": True}]
    with pytest.raises(PeerGone):
        wait.result()
    served.thing.gate.set(2)
    served.wire.pump()
