"""Requests of one kind of object: checked at the border, run inline, answered once.

A `Service` is a table op -> (pydantic model, function, how many fds: one more is EINVAL).  Models are strict
and refuse extra fields; an unknown op is ENOTTY (or what the object's file operations say); a bad field is
EINVAL with pydantic's sentence. A function returns its reply, or a flow (an `async def`) whose end is the
reply.  What it raises as UapiError goes back as errno and sentence; anything else is our bug: logged,
answered EIO, remembered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import CoroutineType
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from protocol.errors import MAX_SHOWN_CHARS, PeerError, UapiError, shown
from protocol.flow import Wait
from protocol.rpc.channel import Body, Channel, Fds, PeerGone, Serve

Obj = TypeVar("Obj")
M = TypeVar("M", bound=BaseModel)

MAX_COMPLAINT_CHARS = 400


class Answer(NamedTuple):
    """A reply that carries fds; they become the channel's."""

    body: Body
    fds: Sequence[int] = ()


Result = Body | Answer | Coroutine[Any, None, "Body | Answer"]


class Method(NamedTuple, Generic[Obj, M]):
    model: type[M]
    run: Callable[[Obj, M, Fds], Result]
    max_fds: int = 0
    takes: Callable[[M], int] | None = None  # of max_fds, if that depends on the message

    def most(self, message: M) -> int:
        """How many fds the message may bring: one that nobody looks at would live as long as the request."""
        return self.max_fds if self.takes is None else self.takes(message)


class Notification(NamedTuple, Generic[Obj, M]):
    model: type[M]
    run: Callable[[Obj, M], None]


Validate = Callable[[Any], Any]


class _Ready(NamedTuple, Generic[Obj]):
    """A method as it is called."""

    validate: Validate
    run: Callable[[Obj, Any, Fds], Result]
    max_fds: int
    takes: Callable[[Any], int] | None


def _validator(model: type[BaseModel]) -> Validate:
    model.model_rebuild()  # builds what was put off; a TypeAdapter would take three times as long
    return model.__pydantic_validator__.validate_python


class Service(Generic[Obj]):
    """The requests objects of one kind answer, and the notifications they take."""

    def __init__(
        self,
        name: str,
        methods: Mapping[str, Method[Obj, Any]],
        *,
        notifications: Mapping[str, Notification[Obj, Any]] | None = None,
        unknown_errno: int = errno.ENOTTY,
    ) -> None:
        self.name = name
        self.methods = methods
        self.notifications = notifications or {}
        self.unknown_errno = unknown_errno
        # One validator an op: the table does what a discriminated union would do again.  Made when the op
        # first comes: of a hundred that a process knows, a run asks some twenty, and each costs its start.
        self._methods: dict[str, _Ready[Obj]] = {}
        self._notifications: dict[str, tuple[Validate, Callable[[Obj, Any], None]]] = {}

    def bind(self, obj: Obj) -> Serve:
        """A handler for one object's channel."""

        def serve(channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
            try:
                result = self._run(obj, body, fds)
                if type(result) is CoroutineType:
                    ended = channel.loop.flows.begin(result)
                    if isinstance(ended, Wait):
                        ended.on_done(lambda wait: self._finish(channel, request_id, body, fds, wait))
                        return
                    result = ended
                _answer(channel, request_id, result)  # type: ignore[arg-type]
            except UapiError as error:
                channel.answer_error(request_id, error)
            except PeerGone as error:  # somebody we needed for this went away
                channel.answer_error(request_id, UapiError(errno.ENODEV, str(error)))
            except PeerError:
                fds.close()
                raise
            except Exception as error:
                channel.answer_error(request_id, _internal(self.name, body))
                channel.loop.report(_crash(self.name, body, error))
            fds.close()

        return serve

    def _finish(self, channel: Channel, request_id: int, body: Body, fds: Fds, wait: Wait[Any]) -> None:
        """A flow that had to wait is over."""
        try:
            _answer(channel, request_id, wait.result())
        except UapiError as error:
            channel.answer_error(request_id, error)
        except PeerError as error:
            channel.answer_error(request_id, UapiError(errno.ENODEV, str(error)))
        except Exception as error:
            channel.answer_error(request_id, _internal(self.name, body))
            channel.loop.report(_crash(self.name, body, error))
        fds.close()

    def bind_notify(self, obj: Obj) -> Callable[[Channel, Body, Fds], None]:
        """The same for notifications; one that is unknown or malformed ends the connection."""

        def told(channel: Channel, body: Body, fds: Fds) -> None:
            op = body.get("op")
            ready = self._notifications.get(op) if type(op) is str else None
            validate, run = ready or self._first_notification(op)
            try:
                message = validate(body)
            except ValidationError as error:
                raise PeerError(f"{op}: {_explain(error)}") from None
            run(obj, message)

        return told

    def _run(self, obj: Obj, body: Body, fds: Fds) -> Result:
        op = body.get("op")
        ready = self._methods.get(op) if type(op) is str else None
        validate, run, max_fds, takes = ready or self._first(op)
        if len(fds) > max_fds:
            raise UapiError(errno.EINVAL, f"{op}: {len(fds)} file descriptors sent, it takes {max_fds}")
        try:
            message = validate(body)
        except ValidationError as error:
            raise UapiError(errno.EINVAL, f"{op}: {_explain(error)}") from None
        if takes is not None and len(fds) > takes(message):
            raise UapiError(
                errno.EINVAL, f"{op}: {len(fds)} file descriptors sent, it takes {takes(message)}"
            )
        return run(obj, message, fds)

    def _first(self, op: object) -> _Ready[Obj]:
        method = self.methods.get(op) if type(op) is str else None
        if method is None:
            raise UapiError(self.unknown_errno, f"{self.name}: unknown request {shown(op)}")
        ready = _Ready(_validator(method.model), method.run, method.max_fds, method.takes)
        self._methods[op] = ready  # type: ignore[index]
        return ready

    def _first_notification(self, op: object) -> tuple[Validate, Callable[[Obj, Any], None]]:
        told = self.notifications.get(op) if type(op) is str else None
        if told is None:
            raise PeerError(f"{self.name}: unknown notification {shown(op)}")
        ready = self._notifications[op] = _validator(told.model), told.run  # type: ignore[index]
        return ready


class _Crash(Exception):
    """Our bug surfaced while serving a request: the loop's on_crash logs it, with its cause."""


def _crash(name: str, body: Body, cause: Exception) -> _Crash:
    crash = _Crash(f"{name}: {shown(body.get('op'))}")
    crash.__cause__ = cause
    return crash


def _answer(channel: Channel, request_id: int, result: Body | Answer) -> None:
    if type(result) is Answer:
        channel.answer(request_id, result.body, result.fds)
    else:
        channel.answer(request_id, result)  # type: ignore[arg-type]


def _internal(name: str, body: Body) -> UapiError:
    return UapiError(errno.EIO, f"{name}: internal error in {shown(body.get('op'))}; see the daemon's log")


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part)[:MAX_SHOWN_CHARS] for part in first["loc"]) or "message"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}, got {shown(first['input'])}{more}"[:MAX_COMPLAINT_CHARS]
