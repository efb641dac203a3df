"""A story as text that can be sent to a mailing list: what was run, the answers that are not the default,
the trace they lead to.

    tdp-share story 1
    scenario unmap
    design shared
    seed 7
    plant R7-devtlb-first
    faults evict,sigstop
    invariant I6
    answers 2:1 4:2
    trace 28b9d3a1c0ffee55
    end 2a8374e9

`plant`, `faults` and `invariant` may be missing, and so is `before` mostly: answers of rounds that were
played in the machine before, one behind the other, a "/" between.  Lines before the first and behind the last
do not matter, nor does the "> " of a quotation, nor where the answers are wrapped.  The last line's number is
a CRC-32 of what stands between, so that a damaged story is not taken for another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from textwrap import wrap
from zlib import crc32

from simulator.search.replay import Answers, trimmed

STORY_VERSION = 1
_FIRST = "tdp-share story"
_WIDTH = 76
_ANSWER = re.compile(r"(\d+):([1-9]\d*)")
_PLACE_MAX = 10_000_000


class StoryError(Exception):
    """The text is no story, a damaged one, or one of another version."""


@dataclass(frozen=True, slots=True)
class Story:
    """`trace`: the Mazurkiewicz trace's number (`causality.Fingerprint`); a replay must come to the same."""

    scenario: str
    design: str
    seed: int
    answers: Answers
    trace: int
    plant: str = ""
    invariant: str = ""
    before: tuple[Answers, ...] = ()
    faults: str = ""  # the kinds that were on


def to_text(story: Story) -> str:
    for name in ("scenario", "design", "plant", "faults", "invariant"):
        value = getattr(story, name)
        assert value == " ".join(value.split()), f"{name} {value!r} does not fit on a line as it is"
    lines = [
        f"scenario {story.scenario}",
        f"design {story.design}",
        f"seed {story.seed}",
        *([f"plant {story.plant}"] if story.plant else []),
        *([f"faults {story.faults}"] if story.faults else []),
        *([f"invariant {story.invariant}"] if story.invariant else []),
        *(_wrapped("before", *story.before) if story.before else []),
        *_wrapped("answers", story.answers),
        f"trace {story.trace:016x}",
    ]
    return "\n".join([f"{_FIRST} {STORY_VERSION}", *lines, f"end {_sum(lines):08x}", ""])


def _wrapped(name: str, *rounds: Answers) -> list[str]:
    told = [" ".join(f"{place}:{answer}" for place, answer in enumerate(each) if answer) for each in rounds]
    return wrap(f"{name} {' / '.join(told)}", _WIDTH, subsequent_indent="  ")


def from_text(text: str) -> Story:
    """Raises StoryError, which says what is wrong and what to do."""
    values = _values(_body(text))
    required = {"scenario", "design", "seed", "answers", "trace"}
    if missing := required - values.keys():
        raise StoryError(f"the story lacks {', '.join(sorted(missing))}: ask its sender for the whole file")
    try:
        seed, trace = int(values["seed"]), int(values["trace"], 16)
    except ValueError as error:
        raise StoryError(f"seed and trace are numbers, this story's are not ({error})") from None
    return Story(
        scenario=values["scenario"],
        design=values["design"],
        seed=seed,
        answers=_answers(values["answers"]),
        trace=trace,
        plant=values.get("plant", ""),
        invariant=values.get("invariant", ""),
        before=tuple(map(_answers, values["before"].split("/"))) if "before" in values else (),
        faults=values.get("faults", ""),
    )


def _sum(lines: list[str]) -> int:
    """Not of how they are wrapped or indented."""
    return crc32(" ".join(" ".join(lines).split()).encode())


def _body(text: str) -> list[str]:
    lines = [re.sub(r"^[>\s]+", "", line).rstrip() for line in text.splitlines()]
    start = next((place for place, line in enumerate(lines) if line.startswith(_FIRST)), None)
    if start is None:
        raise StoryError(f"no line begins with {_FIRST!r}: this is not a story")
    version = lines[start].removeprefix(_FIRST).strip()
    if version != str(STORY_VERSION):
        raise StoryError(
            f"a story of version {version or '(none)'}; this program reads version {STORY_VERSION}"
        )
    end = next((place for place in range(start, len(lines)) if lines[place].startswith("end")), None)
    if end is None:
        raise StoryError('the story has no last line ("end"): it was cut off; ask its sender for the whole')
    body = [line for line in lines[start + 1 : end] if line]
    if lines[end].removeprefix("end").strip() != f"{_sum(body):08x}":
        raise StoryError("the story's checksum is wrong: something in it was changed on the way")
    return body


def _values(body: list[str]) -> dict[str, str]:
    known = {field.name for field in fields(Story)}
    values: dict[str, str] = {}
    name = ""
    for line in body:
        first, _, rest = line.partition(" ")
        if name in ("answers", "before") and (first == "/" or _ANSWER.fullmatch(first)):
            values[name] += f" {line}"
            continue
        name = first
        if name not in known:
            raise StoryError(f"{line!r} says nothing about a story")
        if name in values:
            raise StoryError(f"{name} stands twice in the story")
        values[name] = rest.strip()
    return values


def _answers(text: str) -> Answers:
    answers: list[int] = []
    for pair in text.split():
        found = _ANSWER.fullmatch(pair)
        place = int(found[1]) if found else -1
        if found is None or not len(answers) <= place <= _PLACE_MAX:
            raise StoryError(f"answers are PLACE:ANSWER, in order, none of them 0; {pair!r} is not")
        answers += [0] * (place - len(answers)) + [int(found[2])]
    return trimmed(answers)
