"""Objects of one iommufd: ids, types, users, and who may be destroyed.

Models the iommufd object table [iommufd main.c]: an id names one object until it is destroyed; an
object in use cannot be; a wrong id or type is ENOENT.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from protocol.errors import UapiError

MAX_OBJECTS = 4096


class Object:
    """Anything with an id.  `users` is how many others need it."""

    def __init__(self) -> None:
        self.id = 0
        self.users = 0

    @contextmanager
    def used(self) -> Iterator[Self]:
        """Nobody destroys it meanwhile."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1


T = TypeVar("T", bound=Object)


class Objects:
    def __init__(self) -> None:
        self._objects: dict[int, Object] = {}
        self._next = 1

    def __iter__(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    def add(self, obj: Object) -> int:
        """Give it an id.  ENOMEM past MAX_OBJECTS."""
        if len(self._objects) >= MAX_OBJECTS:
            raise UapiError(errno.ENOMEM, f"an iommufd has at most {MAX_OBJECTS} objects")
        obj.id = self._next
        self._next += 1
        self._objects[obj.id] = obj
        return obj.id

    def get(self, object_id: int, kind: type[T]) -> T:
        obj = self._objects.get(object_id)
        if not isinstance(obj, kind):
            raise UapiError(errno.ENOENT, f"object {object_id}: no such {kind.__name__}")
        return obj

    def remove(self, object_id: int) -> Object:
        """ENOENT; EBUSY while somebody uses it."""
        obj = self.get(object_id, Object)
        if obj.users:
            raise UapiError(errno.EBUSY, f"object {object_id} has {obj.users} users: detach them first")
        del self._objects[object_id]
        return obj

    def drop(self, object_id: int) -> None:
        """The table itself goes: who uses the object lets go of it when it finds out."""
        del self._objects[object_id]

    def all(self, kind: type[T]) -> Iterator[T]:
        return (obj for obj in self if isinstance(obj, kind))
