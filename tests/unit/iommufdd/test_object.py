"""The object table of one iommufd: ids are never used twice, what is used cannot be destroyed."""

from __future__ import annotations

import errno

import pytest

from iommufdd.core.object import MAX_OBJECTS, Object, Objects
from tests.kit.refusals import refused


class Apple(Object):
    pass


class Pear(Object):
    pass


def test_an_object_is_found_by_its_id_and_type() -> None:
    objects = Objects()
    apple, pear = Apple(), Pear()
    assert [objects.add(apple), objects.add(pear)] == [apple.id, pear.id] == [1, 2]
    assert objects.get(1, Apple) is apple
    assert objects.get(2, Object) is pear


@pytest.mark.parametrize("object_id", [0, 2, 3, -1, 1 << 31])
def test_a_wrong_id_or_type_is_enoent(object_id: int) -> None:
    objects = Objects()
    objects.add(Apple())
    objects.add(Pear())
    with refused(errno.ENOENT):
        objects.get(object_id, Apple)


def test_an_id_is_not_used_again() -> None:
    objects = Objects()
    first = objects.add(Apple())
    objects.remove(first)
    assert objects.add(Apple()) != first
    with refused(errno.ENOENT):
        objects.get(first, Apple)
    with refused(errno.ENOENT):
        objects.remove(first)


@pytest.mark.parametrize("users", [1, 2])
def test_an_object_in_use_stays(users: int) -> None:
    objects = Objects()
    apple = Apple()
    objects.add(apple)
    apple.users = users
    with refused(errno.EBUSY):
        objects.remove(apple.id)
    assert objects.get(apple.id, Apple) is apple
    apple.users = 0
    assert objects.remove(apple.id) is apple


def test_the_table_has_a_limit_and_removal_makes_room() -> None:
    objects = Objects()
    for _ in range(MAX_OBJECTS):
        objects.add(Apple())
    with refused(errno.ENOMEM):
        objects.add(Apple())
    objects.remove(7)
    assert objects.add(Apple()) == MAX_OBJECTS + 1


def test_all_of_a_type_can_be_removed_while_they_are_counted() -> None:
    objects = Objects()
    for kind in (Apple, Pear, Apple):
        objects.add(kind())
    for apple in objects.all(Apple):
        objects.remove(apple.id)
    assert list(objects.all(Apple)) == []
    assert [pear.id for pear in objects.all(Object)] == [2]
