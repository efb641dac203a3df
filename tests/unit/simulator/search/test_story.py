"""A story survives a mailing list, and a damaged one is refused with what is wrong."""

from __future__ import annotations

from textwrap import indent
from zlib import crc32

import hypothesis.strategies as st
import pytest
from hypothesis import given

from simulator.search.replay import trimmed
from simulator.search.story import Story, StoryError, from_text, to_text

STORY = Story("unmap", "shared", 7, (0, 0, 1, 0, 2), 0x28B9D3A1C0FFEE55, "R7-devtlb-first", "I6")
WORDS = st.lists(st.text("abcxyz-_./0189", min_size=1, max_size=9), min_size=1, max_size=3).map(" ".join)
ANSWERS = st.lists(st.sampled_from([0, 0, 0, 1, 2, 17]), max_size=200).map(trimmed)
STORIES = st.builds(
    Story,
    scenario=WORDS,
    design=WORDS,
    seed=st.integers(0, 2**63),
    answers=ANSWERS,
    trace=st.integers(0, 2**64 - 1),
    plant=st.one_of(st.just(""), WORDS),
    invariant=st.one_of(st.just(""), WORDS),
    before=st.lists(ANSWERS, max_size=20).map(tuple),
)


def test_a_story_reads_like_this() -> None:
    assert to_text(STORY) == (
        "tdp-share story 1\n"
        "scenario unmap\n"
        "design shared\n"
        "seed 7\n"
        "plant R7-devtlb-first\n"
        "invariant I6\n"
        "answers 2:1 4:2\n"
        "trace 28b9d3a1c0ffee55\n"
        "end 2a8374e9\n"
    )


@given(story=STORIES)
def test_what_was_written_is_read(story: Story) -> None:
    text = to_text(story)
    assert from_text(text) == story
    assert max(map(len, text.splitlines())) <= 76
    quoted = indent(text, "> ", lambda line: True).replace("\n", "\r\n")
    assert from_text(f"Hello,\n\nthis one fails here:\n\n{quoted}\n-- \nA. Reader\n") == story


@given(story=STORIES, place=st.integers(0, 10_000), digit=st.sampled_from("0123456789"))
def test_one_wrong_digit_is_not_another_story(story: Story, place: int, digit: str) -> None:
    text = to_text(story)
    place %= len(text) - 1
    damaged = text[:place] + digit + text[place + 1 :]
    if damaged != text:
        with pytest.raises(StoryError):
            from_text(damaged)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "this is not a story"),
        ("dear all", "this is not a story"),
        (to_text(STORY).replace("story 1", "story 2"), "version 2; this program reads version 1"),
        (to_text(STORY).replace("end ", "ned "), "cut off"),
        (to_text(STORY)[:60], "cut off"),
        (to_text(STORY).replace("unmap", "sharing"), "checksum"),
    ],
)
def test_a_story_that_cannot_be_read_says_why(text: str, complaint: str) -> None:
    with pytest.raises(StoryError, match=complaint):
        from_text(text)


@pytest.mark.parametrize(
    ("line", "instead", "complaint"),
    [
        ("design shared\n", "", "lacks design"),
        ("seed 7\n", "seed seven\n", "are numbers"),
        ("trace 28b9d3a1c0ffee55\n", "trace here\n", "are numbers"),
        ("answers 2:1 4:2\n", "answers 2:1 2:2\n", "in order"),
        ("answers 2:1 4:2\n", "answers 2:0\n", "none of them 0"),
        ("answers 2:1 4:2\n", "answers 99999999999:1\n", "in order"),
        ("seed 7\n", "seed 7\nseed 8\n", "stands twice"),
        ("seed 7\n", "seed 7\nweather fine\n", "says nothing about a story"),
    ],
)
def test_a_story_written_by_hand_is_told_its_mistake(line: str, instead: str, complaint: str) -> None:
    """Its checksum is right, or is made right: what it says cannot be run."""
    damaged = to_text(STORY).replace(line, instead)
    body = " ".join(damaged.splitlines()[1:-1])
    with pytest.raises(StoryError, match=complaint):
        from_text(damaged.replace("end 2a8374e9", f"end {crc32(body.encode()):08x}"))
