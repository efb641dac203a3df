"""A planted bug is in while it is on, for whoever holds the function, and leaves no trace."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import pytest

from simulator.planted.met import met
from simulator.planted.plant import DoesNotApply, Edit, Plant, function_at, telling

HERE = __name__


def logged(function: Callable[..., int]) -> Callable[..., int]:
    @wraps(function)
    def around(*args: int) -> int:
        return 100 + function(*args)

    return around


def double(number: int) -> int:
    return number * 2


@contextmanager
def opened(left: list[str]) -> Iterator[None]:
    yield
    left.append("closed")


class Base:
    def total(self) -> int:
        return 1


class Counter(Base):
    def total(self) -> int:
        return super().total() + 1

    @logged
    def logs(self) -> int:
        return 1

    @property
    def half(self) -> int:
        return 2

    @classmethod
    def named(cls) -> str:
        return cls.__name__

    async def waits(self) -> int:
        return 1


def plant_of(where: str, old: str, new: str) -> Plant:
    return Plant("X1", "A mistake.", "I1", [Edit(f"{HERE}:{where}", old, new)])


def awaited(counter: Counter) -> int:
    flow = counter.waits()
    with pytest.raises(StopIteration) as ended:
        flow.send(None)
    value: int = ended.value.value
    return value


CASES: dict[str, tuple[Plant, Callable[[Counter], object], object]] = {
    "a function": (plant_of("double", "* 2", "* 3"), lambda _: double(2), 6),
    "a method that calls super()": (plant_of("Counter.total", "+ 1", "+ 2"), lambda c: c.total(), 3),
    "a decorated one": (plant_of("Counter.logs", "return 1", "return 2"), lambda c: c.logs(), 102),
    "a property": (plant_of("Counter.half", "return 2", "return 1"), lambda c: c.half, 1),
    "a class method": (
        plant_of("Counter.named", "cls.__name__", "cls.__name__ * 2"),
        lambda c: c.named(),
        "CounterCounter",
    ),
    "one that awaits": (plant_of("Counter.waits", "return 1", "return 2"), awaited, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_in_while_it_is_on_and_then_out(case: str) -> None:
    plant, look, wrong = CASES[case]
    counter = Counter()
    right = look(counter)
    with plant.apply():
        assert look(counter) == wrong != right
    assert look(counter) == right


def test_who_holds_the_function_already_gets_the_mistake_too() -> None:
    held, bound = double, Counter().total
    with plant_of("double", "* 2", "* 3").apply(), plant_of("Counter.total", "+ 1", "+ 2").apply():
        assert (held(2), bound()) == (6, 3)


def test_a_context_manager_is_planted_behind_its_decorator() -> None:
    left: list[str] = []
    with plant_of("opened", 'left.append("closed")', "pass").apply(), opened(left):
        pass
    assert left == []


def test_several_edits_of_one_function_are_one_mistake() -> None:
    edits = [Edit(f"{HERE}:double", "return", "result ="), Edit(f"{HERE}:double", "* 2", "* 2\n    return 0")]
    with Plant("X2", "A mistake.", "I1", edits).apply():
        assert double(2) == 0


def sign(number: int) -> str:
    if number < 0:
        return "less"
    try:
        return "more" if 1 // number else "one"
    except ZeroDivisionError:
        return "none"


@pytest.mark.parametrize(
    ("edits", "come_to"),
    [
        ([('"less"', '"fewer"')], [-1]),
        ([('"none"', '"nothing"')], [0]),
        ([("< 0", "< -9")], [-1, 0, 1]),
        ([('return "less"', 'a = ""\n        return a'), ('"none"', '"nothing"')], [-1, 0]),
        ([('"none"', '"nothing"'), ('return "less"', 'a = ""\n        return a')], [-1, 0]),
        ([("number: int", "number: float")], [-1, 0, 1]),
    ],
    ids=["a branch", "a handler", "a condition", "two", "two, the later first", "no statement"],
)
def test_it_tells_of_the_lines_that_are_edited(edits: list[tuple[str, str]], come_to: list[int]) -> None:
    plant = Plant("X4", "A mistake.", "I1", [Edit(f"{HERE}:sign", *edit) for edit in edits])
    for on in (plant.apply(), telling([plant])):
        met()
        with on:
            found = [number for number in (-1, 0, 1) if [sign(number), met()][1]]
        assert found == come_to
        sign(-1)
        assert met() == frozenset()


def test_all_tell_at_once_and_none_is_in() -> None:
    edits = {"X5": ("sign", '"less"', '"x"'), "X6": ("sign", '"none"', '"x"'), "X7": ("double", "* 2", "* 3")}
    plants = [
        Plant(name, "A mistake.", "I1", [Edit(f"{HERE}:{at}", *how)]) for name, (at, *how) in edits.items()
    ]
    met()
    with telling(plants):
        assert (sign(-1), *met()) == ("less", "X5")
        assert (sign(0), double(2), *sorted(met())) == ("none", 4, "X6", "X7")


def test_it_tells_across_a_fork() -> None:
    met()
    with plant_of("double", "* 2", "* 3").apply():
        child = os.fork()
        if not child:
            double(2)
            os._exit(0)
        os.waitpid(child, 0)
    assert met() == {"X1"}


def test_it_goes_out_whatever_happens_inside() -> None:
    before = double.__code__
    with pytest.raises(RuntimeError), plant_of("double", "* 2", "* 3").apply():
        raise RuntimeError("inside")
    assert double.__code__ is before


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (plant_of("double", "* 7", "* 3"), "0 times"),
        (plant_of("double", "number", "n"), "2 times"),
        (plant_of("nothing", "a", "b"), "is not there"),
        (plant_of("Counter.nothing", "a", "b"), "is not there"),
        (plant_of("HERE", "a", "b"), "no function but str"),
        (plant_of("double", "return", "return return"), "no Python"),
        (plant_of("Counter.total", "super().total()", "0"), "closes over"),
    ],
    ids=["not there", "twice", "no function", "no method", "no code", "no Python", "another closure"],
)
def test_what_does_not_apply_says_why_and_changes_nothing(plant: Plant, why: str) -> None:
    first = plant_of("double", "* 2", "* 3")
    both = Plant("X3", "A mistake.", "I1", [*first.edits, *plant.edits])
    with (
        pytest.raises(DoesNotApply, match=why),
        (plant if plant.edits[0].where == f"{HERE}:double" else both).apply(),
    ):
        raise AssertionError("it applied")
    assert double(2) == 4


def test_the_function_behind_a_name() -> None:
    assert function_at(f"{HERE}:opened") is inspect.unwrap(opened)
    with pytest.raises(DoesNotApply, match="nowhere"):
        function_at("nowhere.at.all:f")
