"""Conversations of the box: turns of dialogues, requests of stories."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.box import conversations, stories


def test_a_chat_alternates_and_the_assistant_has_the_last_word():
    text = "B: Hm.\nA: Hi there\nA: How are  you ?\nB: fine, i think\nA: Good.\nB: Yes.\nA: Bye."
    found = conversations.chat(text, random.Random(0))
    assert [m["role"] for m in found] == ["user", "assistant"] * 2
    assert [m["content"] for m in found] == [
        "Hi there How are you?", "Fine, I think.", "Good.", "Yes.",
    ]  # fmt: skip
    assert conversations.chat("A: Hi.\nB: Hello.", random.Random(0)) is None  # too short
    untidy = "\n".join(f"{'AB'[n % 2]}: typed in haste" for n in range(6))
    assert conversations.chat(untidy, random.Random(0)) is None


def test_a_passage_stands_before_its_first_question():
    text = "A king had a crown.\n\nUser: Who had it?\nAssistant: The king."
    for seed in range(20):
        found = conversations.about_passage(text, random.Random(seed))
        assert found[-1] == {"role": "assistant", "content": "The king."}
        assert "A king had a crown." in found[0]["content"]
        assert found[-2]["content"].endswith("Who had it?")


def test_a_story_is_whole_or_ends_with_a_paragraph():
    lengths = stories.KINDS["storybooks"]
    short = "The fox\n\n" + "A fox was there. The fox was sad, and the fox ran. " * 6
    title, story, whole = stories.parts(short, lengths)
    assert (title, whole) == ("The fox", True)
    assert stories.topic(story, random.Random(0)) == "a fox"
    paragraph = "The crow saw the owl. " * 20
    _, story, whole = stories.parts("\n\n".join([paragraph] * 9), lengths)
    assert not whole
    assert len(story) <= lengths.cut
    assert set(story.split("\n\n")) == {paragraph.strip()}
    assert stories.parts("Too short.", lengths) is None


def test_of_words_as_frequent_the_first_is_the_topic_in_every_process():
    story = "The owl was sad. The fox was sad. The cat was sad. The hen was sad. " * 4
    found = {stories.topic(story, random.Random(seed)) for seed in range(20)}
    assert found == {"a cat", "a cat and a fox"}


def test_a_moral_is_told_or_asked_for():
    story = "The ant worked. " * 20 + "\n\nMoral: Work."
    ways = [stories.told(None, story, random.Random(seed)) for seed in range(30)]
    for messages in ways:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert any(text.endswith("Moral: Work.") or text == "Work." for text in said)
    assert len({str(way) for way in ways}) > 10
